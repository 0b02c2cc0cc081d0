"""Train a diffusion model from a YAML config, or adapt a trained one with LoRA.

    python training/image/train.py --config_path configs/image/digits/ddpm_24x24_v_continuous_clip.yaml
    python training/image/train.py --config_path ... --dataset_name image/digits_inverted --use_lora_training \\
        --load_model_weights_from_checkpoint output/image/digits/ddpm_24x24_v_continuous_clip/diffusion-1700.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdiffusion.cli import Parser, add_ema_flag, add_run_flags, naming_flags, overrides_from_flags, positive_int, run

if TYPE_CHECKING:
    from accelerate import PartialState
    from omegaconf import DictConfig
    from torch import nn

    from xdiffusion.checkpoints.native import ModelFile
    from xdiffusion.data.captioned_images import CaptionedImages
    from xdiffusion.model import DiffusionModel
    from xdiffusion.training.batches import Data
    from xdiffusion.training.run import Draw

SCRIPT = "training/image/train.py"
OF_LORA = ("lora.", "text_encoder_lora.", "optimizer.lora_plus_ratio=")  # keys that nothing else reads
FLAG_KEYS = {
    "dataset_name": "data.kind",
    "data_dir": "data.data_dir",
    "num_training_steps": "training.num_training_steps",
    "batch_size": "training.batch_size",
    "save_and_sample_every_n": "training.save_and_sample_every_n",
    "sample_prompt": "training.sample_prompts",
    "mixed_precision": "training.mixed_precision",
    "compile": "training.compile",
    "seed": "training.seed",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_run_flags(parser)
    add = parser.add_argument
    add(
        "--dataset_name",
        metavar="NAME",
        help="image/digits, image/mnist, image/fashion_mnist, image/cifar10, or one with _inverted; image/folder, "
        "image/hugging_face, image/shards",
    )
    add(
        "--data_dir",
        metavar="DIR",
        help="the folder of image/folder or image/shards; of others an existing copy, without which they are downloaded",
    )
    add(
        "--output_path",
        metavar="DIR",
        help="folder of the run; default output/<dataset>/<config name>, a LoRA's in lora/ below it",
    )
    add("--batch_size", type=positive_int, metavar="N", help="images per step")
    add(
        "--load_model_weights_from_checkpoint",
        metavar="FILE",
        help="start from these weights; with --use_lora_training the frozen base",
    )
    add_ema_flag(parser)
    add(
        "--use_lora_training",
        action="store_true",
        help="freeze the model and train a LoRA (section lora: of the config)",
    )
    add(
        "--sample_prompt",
        action="append",
        metavar="TEXT",
        help="what the sample grids draw, {class}: every class in turn; repeatable (default: captions of the data set)",
    )
    add(
        "--sample_with_guidance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="guidance in the sample grids (sampling.cfg_scale)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the network; its first step takes minutes",
    )
    add("--dry_run", action="store_true", help="print the resolved config and the parameter counts, and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from xdiffusion.build import build_data, build_model, clip_config, load_config
    from xdiffusion.training.checks import check_captions, check_sample_prompts, check_together
    from xdiffusion.training.settings import check_settings

    with naming_flags(args, FLAG_KEYS):  # first what needs no torch, whose import takes seconds
        config = load_config(args.config_path, overrides_from_flags(args, FLAG_KEYS), args.use_lora_training)
        check_settings(config)
        check_together(config, lora=args.use_lora_training)
    adapts = args.use_lora_training or "textual_inversion" in config
    if adapts and not (args.load_model_weights_from_checkpoint or args.dry_run):
        what = "--use_lora_training" if args.use_lora_training else "textual_inversion:"
        raise ValueError(f"{what} adapts a trained model: name it with --load_model_weights_from_checkpoint")
    if args.ema is not None and not args.load_model_weights_from_checkpoint:
        raise ValueError("--ema and --no-ema are of --load_model_weights_from_checkpoint, and there is none")

    import torch

    from xdiffusion.training.processes import leaving_together
    from xdiffusion.training.trainable import describe_model, make_trainable

    if trains_tiny_clip(config, args):
        try:
            check_settings(clip_config(config))
        except ValueError as error:
            raise ValueError(f"clip.{error}") from error
    sampling_of(config)  # what it cannot be drawn by is said now
    torch.manual_seed(config.training.seed)
    with naming_flags(args, FLAG_KEYS):
        prompts = sample_prompts(config)
    if args.dry_run or prompts or "prior" in config:  # else what cannot be trained or drawn is said after hours
        outline = build_model(config, without_weights=True)
        make_trainable(outline, config, lora=args.use_lora_training)
    if prompts:
        with naming_flags(args, FLAG_KEYS):
            check_sample_prompts(prompts, outline.text_encoder, config)
    if args.dry_run:
        print(describe_model(outline, config))
        if args.load_model_weights_from_checkpoint:
            base_file(config, args, says=True)
        if config.data.kind == "image/folder" and config.data.data_dir:
            check_captions(build_data(config), config, outline.text_encoder.context_length)
        return 0
    words = sys.argv[1:] if argv is None else argv
    return leaving_together(partial(set_up_and_train, args, config, adapts, words))


def set_up_and_train(args: argparse.Namespace, config: DictConfig, adapts: bool, words: Sequence[str]) -> int:
    """Make model, data, trainer and folder, and take the steps. Returns the exit status."""
    from xdiffusion.as_trained import drawn_as_base
    from xdiffusion.build import build_data, build_model
    from xdiffusion.checkpoints.hashes import content_hash
    from xdiffusion.checkpoints.paths import existing_weights
    from xdiffusion.training.checks import check_captions, check_outside
    from xdiffusion.training.diffusion_task import DiffusionTask
    from xdiffusion.training.loop import Trainer
    from xdiffusion.training.processes import begin_process, check_precision, first_ones_first
    from xdiffusion.training.run import run_folder, train
    from xdiffusion.training.state import RunCheckpoints
    from xdiffusion.training.trainable import describe_model, make_trainable
    from xdiffusion.training.weights_files import AdapterWeights, ModelWeights, TokenWeights, check_folder

    start = args.load_model_weights_from_checkpoint
    model = build_model(config, without_weights=start is not None)
    process = begin_process(args.force_cpu)
    check_precision(process, config.training)  # what cannot be trained is said before class images are drawn
    if args.resume_from not in (None, "auto"):
        existing_weights(Path(args.resume_from))
    folder = run_folder(config, args.config_path, args.output_path, lora=args.use_lora_training)
    kind = AdapterWeights if args.use_lora_training else TokenWeights if adapts else ModelWeights
    check_folder(folder, kind)
    if start:  # known not to fit before a download
        base = base_file(config, args, says=process.is_main_process)
    else:
        base = None if adapts else begun_model(config, args, folder, process)
    if config.data.kind == "image/folder" and config.data.data_dir:
        check_outside(folder, Path(config.data.data_dir), "what the run draws")
    with first_ones_first(process):  # the others find what the first has downloaded
        data = build_data(config)
    check_captions(data, config, model.text_encoder.context_length)
    clip = None
    if base is None and trains_tiny_clip(config, args):
        clip, status = tiny_clip(config, data, process, words, force_cpu=args.force_cpu)
        if status:
            return status
    with first_ones_first(process):
        begin_with_weights(model, config, base, clip, process)
        own = drawn_as_base(config, base) if "prior" in config else config
        del base
        base_hash = content_hash(model.base_weights()) if adapts or "prior" in config else None
        class_images = own_class_images(model, config, own, base_hash, process) if "prior" in config else None
    check_beginning(process, config, model, data, class_images)
    make_trainable(model, config, lora=args.use_lora_training)
    rounded = config.training.half_frozen_weights and config.training.mixed_precision != "no"
    frozen_hash = content_hash(model.base_weights()) if adapts and rounded else base_hash
    print(describe_model(model))
    tell_unread(args)

    trainer = Trainer(DiffusionTask(model, data, config, class_images=class_images), force_cpu=args.force_cpu)
    checkpoints = RunCheckpoints(folder, kind(config, base_hash if adapts else None))
    draw = drawing(model, data, config, guided=args.sample_with_guidance)
    status = train(trainer, checkpoints, config, draw, script=SCRIPT, words=words, resume_from=args.resume_from)
    if adapts and content_hash(model.base_weights()) != frozen_hash:
        raise RuntimeError("the run changed its frozen base: what it learned belongs to no base that there is")
    return status


def own_class_images(
    model: DiffusionModel, config: DictConfig, own: DictConfig, base_hash: str, process: PartialState
) -> CaptionedImages:
    """The class images of `prior:`, drawn as the base was trained (`own`), whatever the run trains it to predict."""
    from xdiffusion.build import set_process
    from xdiffusion.training.prior_preservation import prepare_class_images

    set_process(model, own)
    images = prepare_class_images(model, own, sampling_of(own), base_hash, process.device)
    set_process(model, config)
    return images


def tell_unread(args: argparse.Namespace) -> None:
    """Name the flags that only a LoRA run would read."""
    of_lora = [o for o in overrides_from_flags(args, FLAG_KEYS) if o.startswith(OF_LORA)]
    if of_lora and not args.use_lora_training:
        print(f"note: without --use_lora_training nothing reads {', '.join(of_lora)}")


def trains_tiny_clip(config: DictConfig, args: argparse.Namespace) -> bool:
    """Whether the run begins with a tiny CLIP of its own, unless it is there already."""
    from xdiffusion.training.text_encoder import TINY

    return not args.load_model_weights_from_checkpoint and config.model.text_encoder.get("pretrained") == TINY


def check_beginning(process: PartialState, config: DictConfig, model: nn.Module, data: Any, class_images: Any | None) -> None:
    """See that all processes begin with the same settings, data and weights.

    Raises:
        ValueError: naming what differs.
    """
    from xdiffusion.checkpoints.hashes import content_hash
    from xdiffusion.training.processes import check_same_everywhere
    from xdiffusion.training.run_record import data_fingerprint, settings_hash

    if process.num_processes > 1:
        hashes = {"data": data_fingerprint(data), "settings": settings_hash(config)}
        hashes |= {"class images": data_fingerprint(class_images)} if class_images is not None else {}
        check_same_everywhere(process, hashes | {"weights": content_hash(model.state_dict())})


def sample_prompts(config: DictConfig) -> list[str]:
    """The prompts of `training.sample_prompts`, with every class in the place of {class}; none: captions are drawn."""
    from xdiffusion.build import INVERTED
    from xdiffusion.data.captions import PROMPT_TABLES
    from xdiffusion.prompts import expand_prompts

    given, table = config.training.sample_prompts, PROMPT_TABLES.get(config.data.kind.removesuffix(INVERTED))
    return expand_prompts(given, table, None, "training.sample_prompts") if given else []


def drawing(model: DiffusionModel, data: Data, config: DictConfig, *, guided: bool) -> Draw:
    """How the run draws its sample grids; class images are drawn as the config says, guided or not."""
    from xdiffusion.model import HALF
    from xdiffusion.training.previews import draw_sample_grid

    sampling, precision = sampling_of(config, guided=guided), HALF.get(config.training.mixed_precision)
    return partial(draw_sample_grid, model, data.prompts, sampling, autocast=precision, own=sample_prompts(config))


def sampling_of(config: DictConfig, *, guided: bool = True) -> dict[str, Any]:
    """How the run draws pictures; see `build_sampling`."""
    from xdiffusion.build import build_sampling, build_schedule, override

    unguided = [] if guided else ["sampling.cfg_scale=1.0"]
    return build_sampling(override(config, unguided, "--no-sample_with_guidance"), build_schedule(config))


def base_file(config: DictConfig, args: argparse.Namespace, *, says: bool) -> ModelFile:
    """The checkpoint that --load_model_weights_from_checkpoint names."""
    from xdiffusion.loading import base_of_run

    return base_of_run(config, args.load_model_weights_from_checkpoint, args.ema, lora=args.use_lora_training, says=says)


def begun_model(config: DictConfig, args: argparse.Namespace, folder: Path, process: PartialState) -> ModelFile | None:
    """The checkpoint that a run goes on from, if it does: its text encoder is in there, wherever it came from at first.

    All processes go on from the same one, or all begin: those that begin train a tiny CLIP together.
    """
    from xdiffusion.checkpoints.native import load_model_file
    from xdiffusion.loading import check_same_architecture
    from xdiffusion.training.processes import check_same_everywhere
    from xdiffusion.training.state import RunCheckpoints
    from xdiffusion.training.weights_files import ModelWeights

    path, said = RunCheckpoints(folder, ModelWeights(config)).weights_to_go_on_from(args.resume_from)
    check_same_everywhere(process, {"checkpoint": said})
    if path is None:
        return None
    file = load_model_file(path)
    check_same_architecture(config, file)
    print(f"text encoder: that of {path}")
    return file


def begin_with_weights(
    model: DiffusionModel, config: DictConfig, base: ModelFile | None, clip: Path | None, process: PartialState
) -> None:
    """Put the weights of a checkpoint into the model, or those of its text encoder into one that begins with random ones."""
    from xdiffusion.loading import load_weights
    from xdiffusion.training.text_encoder import initialise_text_encoder

    if base is None:
        initialise_text_encoder(model.text_encoder, config, clip)
    else:  # where they could stay mapped to the end, who replaces the file in place would change them, or end the run
        load_weights(model, base, mapped=process.device.type != "cpu")


def tiny_clip(
    config: DictConfig, data: Any, process: PartialState, words: Sequence[str], *, force_cpu: bool
) -> tuple[Path, int]:
    """The file of the tiny CLIP's text tower, trained now where it is not there yet, and the exit status of that.

    A training of it that was stopped goes on, but with several processes, whose disks may not be the same.
    """
    from xdiffusion.build import build_fresh_text_encoder, clip_config
    from xdiffusion.places import OUTPUT_ROOT
    from xdiffusion.training.folder_lock import in_turn
    from xdiffusion.training.processes import largest
    from xdiffusion.training.text_encoder import tiny_clip_path, train_tiny_clip

    clip = clip_config(config)
    path = tiny_clip_path(clip, data, OUTPUT_ROOT)
    with in_turn(path) if process.is_main_process else nullcontext():  # another run may begin with the same
        if not largest(process, int(not path.is_file())):
            return path, 0
        print(f"text encoder: no tiny CLIP at {path} yet, training it")
        resume_from = "auto" if process.num_processes == 1 else None
        command = {"script": SCRIPT, "words": words, "resume_from": resume_from, "force_cpu": force_cpu}
        return path, train_tiny_clip(build_fresh_text_encoder(clip), clip, data, path, **command)


if __name__ == "__main__":
    sys.exit(run(main, lasting=True))
