"""Score a checkpoint, or a LoRA on it: does it draw what it is asked for, and does it draw it like the data?

    python sampling/image/evaluate.py --checkpoint P --dataset_name image/digits --json
    python sampling/image/evaluate.py --checkpoint P --lora_path L --dataset_name image/digits_inverted --json
    python sampling/image/evaluate.py --checkpoint P --lora_path L --data_dir photos --clip ViT-B-32-quickgelu/openai

prompt_accuracy: share of samples in which the judge, a classifier of the real images, sees the prompted class.
frechet_distance: between the judge's features of the samples and of the held-out images; frechet_floor: the same for
as many training images as samples, or all that there are, the mean of ten draws (of captioned pictures one);
frechet_floor_balanced: with as many of each class as the samples, which is what samples without a fault would have.
background: mean brightness in [0, 1] over the pixels that are background in 99% of the images. gap_closed (a LoRA on an
inverted set): share of the way from the base's loss there to its loss on its own images. For an inverted set the
judge sees the samples un-inverted.

--intervals adds intervals of 95%, for the chance of the images, not of the training: of shares by counting, of other scores by
the bootstrap, of gap_closed over its fixed images and noise. Those of frechet_distance and data_copying are of the chance of
samples and held-out images; those of precision, recall, density, coverage and diversity of one of the two, given the other.
Held-out images that are variants of one digit count as one. What a score is read beside (frechet_floor, judge_accuracy,
NAME_real: of images that the judge has seen in its training) has none. --full adds:
precision, recall, density and coverage of the samples' features against held-out images; diversity within a class over the
data's; data_copying, copies and nearest_distance, a check for memorised training images; loss_curve, the held-out loss by
log-SNR; bits_per_dim of discrete DDPMs. NAME_real is the same score of those training images. --report writes all of it, with
pictures, as one page. --images_path writes the samples and the held-out images as PNG files: standard scores on Inception's
features, which need its weights and colour pictures, are those of torch-fidelity or torchmetrics on the two folders.

Captioned pictures without classes (image/folder, as for Stable Diffusion) have no judge. Samples of their captions have
diversity, copies, nearest_distance and, beside pictures that are held out, data_copying; with --full the loss_curve, and with
--clip MODEL/TAG a CLIP score and, on its features, Frechet distance and overlap. Whether the pictures are those that the
model was trained on is said. --data_dir names the folder to compare with, and --training_data_dir, where that is another, the
training pictures: no folder is read because a file names it. A score that cannot be had is null.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from xdiffusion.cli import SAMPLING_FLAGS, Parser, add_model_flags, positive_int, run, sampling_overrides, seed_number
from xdiffusion.places import JUDGE_FOLDER, OUTPUT_ROOT

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from xdiffusion.data.captioned_images import CaptionedImages
    from xdiffusion.data.image_set import ImageSet
    from xdiffusion.scoring import Evaluation
    from xdiffusion.text_encoders.clip import CLIPTextEncoder

FLAG_KEYS = SAMPLING_FLAGS | {"dataset_name": "data.kind", "data_dir": "data.data_dir"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--lora_path", action="append", metavar="FILE[:SCALE]", help="a LoRA of this model and its strength (1)")
    add(
        "--dataset_name",
        metavar="NAME",
        help="the images to compare with, such as image/digits_inverted for a LoRA (default: what it was trained on)",
    )
    add("--data_dir", metavar="DIR", help="the folder of image/folder; of others an existing copy, not to be downloaded")
    add("--training_data_dir", metavar="DIR", help="the folder of captioned pictures that the model was trained on")
    add(
        "--num_samples",
        type=positive_int,
        metavar="N",
        help="samples, spread evenly over the classes (1000) or captions (50)",
    )
    add("--batch_size", type=positive_int, metavar="N", help="images drawn at a time (100; 1 of 512x512)")
    add(
        "--seed",
        type=seed_number,
        default=0,
        metavar="N",
        help="of the noise, the prompts' wording and the real samples of the floor (0)",
    )
    add(
        "--intervals",
        type=positive_int,
        nargs="?",
        const=1000,
        metavar="N",
        help="add intervals of 95%%, of what is no share by N bootstrap resamples (without a number 1000)",
    )
    add("--full", action="store_true", help="add all scores that are not plain; about as long again")
    add(
        "--clip",
        metavar="NAME",
        help="add a CLIP score: own, by the model's text encoder and a vision tower trained for it on the first call, or "
        "MODEL/TAG of open_clip such as ViT-B-32-quickgelu/openai; implies --full",
    )
    add("--report", type=Path, metavar="HTML", help="write one self-contained page; implies --intervals and --full")
    add("--images_path", type=Path, metavar="DIR", help="write DIR/samples and DIR/held_out, one PNG for each image")
    add("--json", action="store_true", help="print one line of JSON and nothing else")
    add("--allow_other_base", action="store_true", help="apply a LoRA although it was trained on another base")
    args = parser.parse_args(argv)
    if args.intervals == 1:
        raise ValueError("--intervals 1: a spread needs at least 2 resamples")
    if args.report and args.report.is_dir():
        raise ValueError(f"--report {args.report} is a folder, not the name of a page")
    if args.images_path and args.images_path.is_dir() and any(args.images_path.iterdir()):
        raise ValueError(f"--images_path {args.images_path} holds files already; name an empty or a new folder")
    if args.lora_path and len(args.lora_path) > 1:
        raise ValueError(
            f"--lora_path is given {len(args.lora_path)} times, and one LoRA is scored: lora merge A:1 B:1 OUT makes one of two"
        )
    args.lora_path = args.lora_path and args.lora_path[0]
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    import copy

    from omegaconf import OmegaConf

    from xdiffusion.as_trained import as_trained
    from xdiffusion.build import build_sampling, image_shape, override, set_process
    from xdiffusion.checkpoints.hashes import content_hash
    from xdiffusion.checkpoints.lora_formats.native import trained_config
    from xdiffusion.checkpoints.native import lora_file
    from xdiffusion.checkpoints.paths import weights_file
    from xdiffusion.checkpoints.writing import ensure_writable
    from xdiffusion.data.image_set import ImageSet
    from xdiffusion.loading import in_file, load_model, stored_config
    from xdiffusion.lora.weights import load_lora_weights, parse_lora_spec
    from xdiffusion.model import at_a_time, best_device
    from xdiffusion.scoring import Depth, check_set_fits, score

    for folder in filter(None, (args.report and args.report.parent, args.images_path)):
        ensure_writable(folder)
    model, config = load_model(weights_file(args.checkpoint), args.config_path, ema=args.ema)
    base_hash, trained, said_by = content_hash(model.base_weights()), config, args.checkpoint
    text_encoder = copy.deepcopy(model.text_encoder) if args.clip == "own" else None  # a LoRA may change it
    if args.lora_path:
        given, scale = parse_lora_spec(args.lora_path)
        path = lora_file(given)
        load_lora_weights(model, path, scale=scale, base_hash=base_hash, allow_other_base=args.allow_other_base)
        config = as_trained(config, [path])
        set_process(model, config)
        if said := trained_config(path):
            trained, said_by = stored_config(said, path), path
    config = OmegaConf.create(OmegaConf.to_container(config) | {"data": OmegaConf.to_container(trained.data)})
    with sampling_overrides(args, FLAG_KEYS) as overrides:
        config = override(config, overrides, "command line")
    with in_file(said_by) if not args.data_dir else nullcontext(), redirect_stdout(sys.stderr if args.json else sys.stdout):
        model.resize(*image_shape(config)[1:])
        data, training = pictures_of(config, args)
    with_classes, full = isinstance(data, ImageSet), args.full or bool(args.clip or args.report)
    num_samples = args.num_samples or (1000 if with_classes else 50)
    if with_classes:
        check_set_fits(model, data, num_samples, full)  # before a tower is trained
    towers = clip_towers(args.clip, text_encoder, data) if args.clip else None
    model.to(best_device(args.force_cpu))

    sampling = build_sampling(config, model.schedule) | {"batch_size": args.batch_size or at_a_time(model)}
    resamples = args.intervals or (1000 if args.report else 0)
    depth = Depth(resamples, full, towers)
    common = {"num_samples": num_samples, "seed": args.seed, "has_lora": bool(args.lora_path), "depth": depth}
    if with_classes:
        evaluation = score(model, data, sampling, **common, judge_folder=JUDGE_FOLDER)
    else:
        from xdiffusion.captioned_scoring import score_captioned

        evaluation = score_captioned(model, data, training, sampling, **common)
    scores = evaluation.scores
    scores |= {"sampler": config.sampling.sampler.kind, **{k: config.sampling[k] for k in ("steps", "cfg_scale")}}
    print(json.dumps(scores, allow_nan=False) if args.json else as_text(evaluation))
    write_files(args, evaluation, data, config, base_hash)
    return 0


def as_text(evaluation: Evaluation) -> str:
    """A line for each score, or for why there is none."""
    lines = {key: value for key, value in evaluation.scores.items() if value is not None and key != "loss_curve"}
    lines |= {"loss_curve": "in --json and --report"} if evaluation.curves else {}
    lines |= {key: f"none: {reason}" for key, reason in evaluation.reasons.items()}
    width = max(map(len, lines))
    return "\n".join([evaluation.about, *(f"{key:<{width}}  {value}" for key, value in lines.items())])


def pictures_of(config: DictConfig, args: argparse.Namespace) -> tuple[ImageSet | CaptionedImages, CaptionedImages | None]:
    """The set to compare with, and where it has no classes the pictures that the model was trained on, if a flag names them
    or the run's own record knows them again.

    Of sets without classes, a folder that is only named by a model's file, who knows whose, is not read.

    Raises:
        ValueError: for a set without an end, or one that no flag names.
    """
    from xdiffusion.build import build_data, override
    from xdiffusion.config_files import assignment
    from xdiffusion.data.captioned_images import CaptionedImages
    from xdiffusion.data.image_set import ImageSet

    kind = config.data.kind
    if kind == "image/hugging_face" and not args.dataset_name:
        raise ValueError(f"--dataset_name {kind} must be given: it is downloaded, and only a file of the model names it")
    if kind in ("image/folder", "image/shards", "image/hugging_face") and args.data_dir is None:
        config = override(config, ["data.data_dir=null"], "command line")
    if config.data.image_size % config.data.get("bucket_multiple", 1):  # all pictures are cut to the model's size
        config = override(config, [assignment("data.bucket_multiple", config.data.image_size)], "command line")
    data = build_data(config)
    if isinstance(data, ImageSet):
        if args.training_data_dir is not None:
            raise ValueError(
                f"--training_data_dir {args.training_data_dir} is for captioned pictures; {data.name} has a training split"
            )
        return data, None
    if args.images_path:
        raise ValueError(f"--images_path {args.images_path}: of captions sample.py writes single pictures, by --prompt")
    if not isinstance(data, CaptionedImages):
        raise ValueError(f"{data.name} has no end to compare with: save some of its pictures and use image/folder")
    if args.training_data_dir in (None, args.data_dir):
        return data, data if args.training_data_dir or was_trained_on(data, args.lora_path or args.checkpoint) else None
    training = override(config, [assignment("data.data_dir", args.training_data_dir)], "--training_data_dir")
    return data, build_data(training)


def was_trained_on(data: CaptionedImages, file: str) -> bool:
    """Whether the run.json beside a checkpoint or a LoRA tells of these very pictures and captions."""
    from xdiffusion.checkpoints.errors import CheckpointError
    from xdiffusion.lora.weights import parse_lora_spec
    from xdiffusion.training.run_record import data_fingerprint, read_run

    try:
        run = read_run(parse_lora_spec(file)[0].parent)
    except CheckpointError:
        return False
    return run.get("data", {}).get("fingerprint") == data_fingerprint(data)


def clip_towers(name: str, text_encoder: CLIPTextEncoder | None, data: ImageSet | CaptionedImages) -> nn.Module:
    """Both towers of `--clip`; our own from the text encoder as it was before a LoRA.

    Raises:
        ValueError: for our own, where the pictures have no classes to train a vision tower with.
    """
    from xdiffusion.clip_towers import PublishedTowers, own_towers
    from xdiffusion.data.image_set import ImageSet, invert

    if text_encoder is None:
        return PublishedTowers(name)
    if not isinstance(data, ImageSet):
        raise ValueError("--clip own has no vision tower for pictures without classes; name a published CLIP: MODEL/TAG")
    return own_towers(text_encoder, invert(data) if data.inverted else data, OUTPUT_ROOT / "clip")


def write_files(args: argparse.Namespace, evaluation: Evaluation, data: ImageSet, config: DictConfig, base_hash: str) -> None:
    """The page, and samples and held-out images in two folders, as other programs compare them, if they are asked for."""
    from xdiffusion.pictures import as_picture, save_png

    if args.images_path:
        for name, images in (("samples", evaluation.images), ("held_out", data.test.floats())):
            for i, image in enumerate(images):
                save_png(as_picture(image), args.images_path / name / f"{i:05}.png")
    if args.report:
        write_report(args, evaluation, config, base_hash)


def write_report(args: argparse.Namespace, evaluation: Evaluation, config: DictConfig, base_hash: str) -> None:
    """The page, and where from its numbers are."""
    import platform
    import shlex
    from datetime import datetime, timezone

    import torch
    from omegaconf import OmegaConf

    from xdiffusion import report
    from xdiffusion.model import best_device

    provenance = {
        "command": f"python sampling/image/evaluate.py {shlex.join(args.argv)}",
        "checkpoint": f"{args.checkpoint} ({base_hash})",
        "LoRA": args.lora_path or "none",
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
        "device": f"{best_device(args.force_cpu)}, {torch.get_num_threads()} threads",
    }
    report.write_report(args.report, evaluation, OmegaConf.to_yaml(config), provenance)
    if not args.json:
        print(args.report)


if __name__ == "__main__":
    sys.exit(run(main))
