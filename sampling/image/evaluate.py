"""Score a checkpoint, or a LoRA on it: does it draw what it is asked for, and does it draw it like the data?

    python sampling/image/evaluate.py --checkpoint P --dataset_name image/digits --json
    python sampling/image/evaluate.py --checkpoint P --lora_path L --dataset_name image/digits_inverted --json

prompt_accuracy: share of samples in which the judge, a classifier of the real images, sees the prompted class.
frechet_distance: between the judge's features of the samples and of the held-out images; frechet_floor: the same for as
many real training images. background: mean brightness in [0, 1] over the pixels that are background in 99% of the images.
gap_closed (a LoRA on an inverted set): share of the way from the base's loss there to its loss on its own images. For an
inverted set the judge sees the samples un-inverted.

--intervals adds intervals of 95%: of shares exact ones, of other scores by the bootstrap. --full adds: precision, recall,
density and coverage of the samples' features against held-out images; diversity within a class over the data's;
data_copying, copies and nearest_distance, a check for memorised training images; loss_curve, the held-out loss by log-SNR;
bits_per_dim of discrete DDPMs. NAME_real is the same score of as many real images. --report writes all of it, with pictures,
as one page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xdiffusion.cli import SAMPLING_FLAGS, Parser, add_model_flags, positive_int, run, sampling_overrides
from xdiffusion.places import JUDGE_FOLDER, OUTPUT_ROOT

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from xdiffusion.data.image_set import ImageSet
    from xdiffusion.model import DiffusionModel
    from xdiffusion.scoring import Evaluation

FLAG_KEYS = SAMPLING_FLAGS | {"dataset_name": "data.kind", "data_dir": "data.data_dir"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--lora_path", metavar="FILE[:SCALE]", help="a LoRA of this model and its strength (1)")
    add(
        "--dataset_name",
        metavar="NAME",
        help="the images to compare with, such as image/digits_inverted for a LoRA (default: the checkpoint's)",
    )
    add("--data_dir", metavar="DIR", help="an existing copy of the data set; without it, it is downloaded")
    add(
        "--num_samples",
        type=positive_int,
        default=1000,
        metavar="N",
        help="samples, spread evenly over the classes (1000)",
    )
    add(
        "--seed",
        type=int,
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
    add("--json", action="store_true", help="print one line of JSON and nothing else")
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from xdiffusion.build import build_data, build_sampling, override
    from xdiffusion.checkpoints.files import content_hash, ensure_writable, weights_file
    from xdiffusion.data.image_set import ImageSet
    from xdiffusion.loading import load_model
    from xdiffusion.lora import load_lora_weights
    from xdiffusion.lora.weights import parse_lora_spec
    from xdiffusion.model import best_device
    from xdiffusion.scoring import Depth, score

    if args.intervals == 1:
        raise ValueError("--intervals 1: a spread needs at least 2 resamples")
    if args.report:
        ensure_writable(args.report.parent)
    model, config = load_model(weights_file(args.checkpoint), args.config_path)
    config = override(config, sampling_overrides(args, FLAG_KEYS), "command line")
    data = build_data(config)
    if not isinstance(data, ImageSet):
        raise ValueError(f"{data.name} has no classes: the scores are for sets such as image/digits (--dataset_name)")
    base_hash = content_hash(model.base_weights())
    towers = clip_towers(args.clip, model, data) if args.clip else None
    if args.lora_path:
        path, scale = parse_lora_spec(args.lora_path)
        load_lora_weights(model, weights_file(path), scale=scale, base_hash=base_hash)
    model.to(best_device(args.force_cpu))

    resamples = args.intervals or (1000 if args.report else 0)
    evaluation = score(
        model,
        data,
        build_sampling(config, model.schedule),
        num_samples=args.num_samples,
        seed=args.seed,
        has_lora=bool(args.lora_path),
        judge_folder=JUDGE_FOLDER,
        depth=Depth(resamples, args.full or bool(args.clip or args.report), towers),
    )
    scores = evaluation.scores
    scores |= {"sampler": config.sampling.sampler.kind, **{k: config.sampling[k] for k in ("steps", "cfg_scale")}}
    if args.report:
        write_report(args, evaluation, data, config, base_hash)
    if args.json:
        print(json.dumps(scores, allow_nan=False))
    else:
        width = max(map(len, scores))
        print("\n".join(f"{key:<{width}}  {value}" for key, value in scores.items() if key != "loss_curve"))
    return 0


def clip_towers(name: str, model: DiffusionModel, data: ImageSet) -> nn.Module:
    """Both towers of `--clip`; our own from a copy of the text encoder, which a LoRA may change later."""
    import copy

    from xdiffusion.clip_towers import PublishedTowers, own_towers
    from xdiffusion.data.image_set import invert

    if name != "own":
        return PublishedTowers(name)
    return own_towers(copy.deepcopy(model.text_encoder), invert(data) if data.inverted else data, OUTPUT_ROOT / "clip")


def write_report(
    args: argparse.Namespace, evaluation: Evaluation, data: ImageSet, config: DictConfig, base_hash: str
) -> None:
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
    report.write_report(args.report, evaluation, data, OmegaConf.to_yaml(config), provenance)
    if not args.json:
        print(args.report)


if __name__ == "__main__":
    sys.exit(run(main))
