"""Train a diffusion model from a YAML config, or adapt a trained one with LoRA.

    python training/image/train.py --config_path configs/image/digits/ddpm_24x24_v_continuous_clip.yaml
    python training/image/train.py --config_path ... --dataset_name image/digits_inverted --use_lora_training \\
        --load_model_weights_from_checkpoint output/image/digits/ddpm_24x24_v_continuous_clip/diffusion-1700.safetensors
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from xdiffusion.cli import overrides_from_flags, positive_int, run

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from xdiffusion.training.interruption import Interruption
    from xdiffusion.training.loop import StepMetrics, Trainer
    from xdiffusion.training.run_record import RunRecord
    from xdiffusion.training.state import RunCheckpoints

FLAG_KEYS = {
    "dataset_name": "data.kind",
    "data_dir": "data.data_dir",
    "num_training_steps": "training.num_training_steps",
    "batch_size": "training.batch_size",
    "save_and_sample_every_n": "training.save_and_sample_every_n",
    "mixed_precision": "training.mixed_precision",
    "compile": "training.compile",
    "seed": "training.seed",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config_path", required=True, metavar="YAML", help="the config; every flag below beats it")
    add(
        "--dataset_name",
        metavar="NAME",
        help="image/digits, image/mnist, image/fashion_mnist, image/cifar10, or one with _inverted; image/folder; "
        "image/shards",
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
    add("--num_training_steps", type=positive_int, metavar="N", help="optimizer steps")
    add("--batch_size", type=positive_int, metavar="N", help="images per step")
    add(
        "--save_and_sample_every_n", type=positive_int, metavar="N", help="steps between checkpoints with a sample grid"
    )
    add(
        "--load_model_weights_from_checkpoint",
        metavar="FILE",
        help="start from these weights; with --use_lora_training the frozen base",
    )
    add("--resume_from", metavar="FILE", help="continue a run from one of its checkpoints, or 'auto' from its newest")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="autocast; what is trained stays float32")
    add(
        "--use_lora_training",
        action="store_true",
        help="freeze the model and train a LoRA (section lora: of the config)",
    )
    add(
        "--sample_with_guidance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="guidance in the sample grids (sampling.cfg_scale)",
    )
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile the network")
    add("--force_cpu", action="store_true", help="do not use a GPU that is there")
    add("--seed", type=int, metavar="N", help="of weights, data order, noise and captions")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any config key, such as optimizer.learning_rate=1e-3; repeatable",
    )
    add("--dry_run", action="store_true", help="print the resolved config and the parameter counts, and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from xdiffusion.build import build_model, load_config

    config = load_config(args.config_path, overrides_from_flags(args, FLAG_KEYS), args.use_lora_training)
    adapts = args.use_lora_training or "textual_inversion" in config
    if adapts and not (args.load_model_weights_from_checkpoint or args.dry_run):
        what = "--use_lora_training" if args.use_lora_training else "textual_inversion:"
        raise ValueError(f"{what} adapts a trained model: name it with --load_model_weights_from_checkpoint")

    import torch

    from xdiffusion.training.divergence import TrainingDiverged
    from xdiffusion.training.processes import LostProcess, noticing_lost_processes
    from xdiffusion.training.run import describe_model, make_trainable

    torch.manual_seed(config.training.seed)
    if args.dry_run:
        model = build_model(config, without_weights=True)
        make_trainable(model, config, lora=args.use_lora_training)
        print(describe_model(model, config))
        return 0
    try:
        with noticing_lost_processes():
            return set_up_and_train(args, config, adapts, sys.argv[1:] if argv is None else argv)
    except (LostProcess, TrainingDiverged) as error:  # where the tiny CLIP diverges
        print(f"error: before the first step, {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def set_up_and_train(args: argparse.Namespace, config: DictConfig, adapts: bool, words: Sequence[str]) -> int:
    """Make model, data, trainer and folder, and take the steps. Returns the exit status."""
    from accelerate import PartialState

    from xdiffusion.build import build_data, build_model, build_sampling
    from xdiffusion.checkpoints.files import content_hash, weights_file
    from xdiffusion.checkpoints.native import load_model_file
    from xdiffusion.loading import check_same_architecture, load_weights
    from xdiffusion.training.loop import Trainer
    from xdiffusion.training.prior_preservation import prepare_class_images
    from xdiffusion.training.processes import check_same_everywhere, first_ones_first
    from xdiffusion.training.run import OUTPUT_ROOT, describe_model, make_trainable, run_folder
    from xdiffusion.training.run_record import data_fingerprint
    from xdiffusion.training.state import RunCheckpoints
    from xdiffusion.training.text_encoder import initialise_text_encoder

    model = build_model(config, without_weights=args.load_model_weights_from_checkpoint is not None)
    process = PartialState(cpu=args.force_cpu)
    if not process.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    folder = run_folder(config, args.config_path, args.output_path, lora=args.use_lora_training)
    sampling = build_sampling(config, model.schedule) | ({} if args.sample_with_guidance else {"cfg_scale": 1.0})
    with first_ones_first(process):  # the others find what the first has downloaded and trained
        data = build_data(config)
        if args.load_model_weights_from_checkpoint:
            file = load_model_file(weights_file(args.load_model_weights_from_checkpoint))
            check_same_architecture(config, file)
            load_weights(model, file)
        else:
            initialise_text_encoder(model.text_encoder, config, data, OUTPUT_ROOT)
        class_images = prepare_class_images(model, config, sampling, process.device) if "prior" in config else None
    if process.num_processes > 1:
        check_same_everywhere({"data": data_fingerprint(data), "weights": content_hash(model.state_dict())})
    base_hash = content_hash(model.base_weights()) if adapts else None
    make_trainable(model, config, lora=args.use_lora_training)
    frozen_hash = content_hash(model.base_weights()) if adapts else None  # another one where they were rounded
    print(describe_model(model))

    trainer = Trainer(model, data, config, class_images=class_images, force_cpu=args.force_cpu)
    checkpoints = RunCheckpoints(folder, config, base_hash, tokens_only=adapts and not args.use_lora_training)
    status = train(trainer, checkpoints, config, sampling, words, args.resume_from)
    assert not adapts or content_hash(model.base_weights()) == frozen_hash, "an adapter changed its frozen base"
    return status


def train(
    trainer: Trainer,
    checkpoints: RunCheckpoints,
    config: DictConfig,
    sampling: Mapping[str, Any],
    words: Sequence[str],
    resume_from: str | None,
) -> int:
    """Take the steps and keep run.json; where they end early, say why and how to go on. Returns the exit status."""
    from xdiffusion.checkpoints.files import CheckpointError
    from xdiffusion.training.divergence import TrainingDiverged
    from xdiffusion.training.interruption import Interruption, resuming_command
    from xdiffusion.training.processes import LostProcess
    from xdiffusion.training.run import begin

    first_step = 1 + (checkpoints.resume(trainer, resume_from) if resume_from else 0)
    record = begin(trainer, checkpoints, config, ["training/image/train.py", *words], first_step)
    go_on = resuming_command(__file__, words, trainer.accelerator.num_processes)
    with Interruption() as interruption:
        try:
            number = take_steps(trainer, checkpoints, sampling, record, first_step, interruption)
        except (TrainingDiverged, LostProcess, CheckpointError, OSError) as error:
            record.finish("diverged" if isinstance(error, TrainingDiverged) else "failed")
            newest = checkpoints.newest()
            print(
                f"error: training stopped after step {record.last_step}, {' '.join(str(error).split())}; "
                f"last good checkpoint: {newest or 'none'}" + (f"; to go on from it: {go_on}" if newest else ""),
                file=sys.stderr,
            )
            return 1
    record.finish("interrupted" if number else "finished")
    if number:
        name = signal.Signals(number).name
        print(f"stopped by {name} after step {record.last_step}; to go on: {go_on}", file=sys.stderr)
    return 128 + number if number else 0


def take_steps(
    trainer: Trainer,
    checkpoints: RunCheckpoints,
    sampling: Mapping[str, Any],
    record: RunRecord,
    first_step: int,
    interruption: Interruption,
) -> int:
    """Train from first_step on, writing what a run writes; go back where it diverges and `training.rollbacks` allows.

    Returns:
        The number of the signal that stopped it, or 0.
    """
    from xdiffusion.training.divergence import TrainingDiverged
    from xdiffusion.training.loop import averaged, fit
    from xdiffusion.training.previews import draw_preview
    from xdiffusion.training.records import Records
    from xdiffusion.training.run import go_back

    folder, prompts = checkpoints.folder, trainer.data.prompts
    writes = trainer.accelerator.is_main_process
    with Records(folder, first_step, trainer.settings.num_training_steps) if writes else nullcontext() as records:

        def picture_of(step: int) -> Path:
            return folder / "samples" / f"sample-{step}.png"

        def on_step(metrics: StepMetrics) -> None:
            record.last_step = metrics.step
            if writes:
                records.step(metrics)
                checkpoints.raise_failure()

        def on_checkpoint(step: int) -> None:
            say = lambda path: records.say(f"step {step}: {path} ({path.stat().st_size:,} bytes)")  # noqa: E731
            checkpoints.save(trainer, step, say)

        def on_sample(step: int) -> None:
            if not (writes or trainer.sharded):  # sharded weights compute in all processes together
                return
            path = picture_of(step) if writes else None
            page = draw_preview(trainer.model, prompts, sampling, path, f"step {step}")
            if writes:
                records.image("samples", page, step)
                records.say(f"step {step}: {picture_of(step)}")

        callbacks = {"on_step": on_step, "on_checkpoint": on_checkpoint, "on_sample": on_sample}
        resumed = first_step - 1
        if resumed and trainer.settings.is_due(resumed) and not picture_of(resumed).is_file():
            with averaged(trainer):  # a run that was killed between its checkpoint and its picture
                on_sample(resumed)
        while True:
            try:
                return fit(trainer, first_step=first_step, signal=lambda: interruption.signal, **callbacks)
            except TrainingDiverged as error:
                first_step = go_back(trainer, checkpoints, error)
                if writes:
                    records.go_back(first_step, f"{error}; going on from step {first_step} with other noise")
            finally:
                checkpoints.finish()


if __name__ == "__main__":
    sys.exit(run(main))
