"""Train a diffusion model from a YAML config, or adapt a trained one with LoRA.

    python training/image/train.py --config_path configs/image/digits/ddpm_24x24_v_continuous_clip.yaml
    python training/image/train.py --config_path ... --dataset_name image/digits_inverted --use_lora_training \\
        --load_model_weights_from_checkpoint output/image/digits/ddpm_24x24_v_continuous_clip/diffusion-1400.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from xdiffusion.cli import overrides_from_flags, positive_int, run

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
        help="image/digits, image/mnist, image/fashion_mnist, image/cifar10, or one with _inverted",
    )
    add("--data_dir", metavar="DIR", help="an existing copy of the data set; without it, it is downloaded")
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
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="autocast; weights, LoRA's too, stay float32")
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
    from xdiffusion.build import (
        build_data,
        build_model,
        build_sampling,
        check_same_architecture,
        load_config,
        load_weights,
    )

    config = load_config(args.config_path, overrides_from_flags(args, FLAG_KEYS), args.use_lora_training)
    if args.use_lora_training and not (args.load_model_weights_from_checkpoint or args.dry_run):
        raise ValueError(
            "--use_lora_training adapts a trained model: name it with --load_model_weights_from_checkpoint"
        )

    import torch

    from xdiffusion.checkpoints.files import content_hash, weights_file
    from xdiffusion.checkpoints.native import load_model_file
    from xdiffusion.training.loop import Trainer, TrainingDiverged, fit
    from xdiffusion.training.previews import draw_preview
    from xdiffusion.training.records import Records
    from xdiffusion.training.run import OUTPUT_ROOT, describe_model, make_trainable, run_folder, save_config
    from xdiffusion.training.state import RunCheckpoints
    from xdiffusion.training.text_encoder import initialise_text_encoder

    torch.manual_seed(config.training.seed)
    model = build_model(config)
    if args.dry_run:
        make_trainable(model, config, lora=args.use_lora_training)
        print(describe_model(model, config))
        return 0

    folder = run_folder(config, args.config_path, args.output_path, lora=args.use_lora_training)
    data = build_data(config)
    if args.load_model_weights_from_checkpoint:
        file = load_model_file(weights_file(args.load_model_weights_from_checkpoint))
        check_same_architecture(config, file)
        load_weights(model, file)
    else:
        initialise_text_encoder(model.text_encoder, config, data, OUTPUT_ROOT)
    base_hash = content_hash(model.base_weights()) if args.use_lora_training else None
    make_trainable(model, config, lora=args.use_lora_training)
    print(describe_model(model))

    trainer = Trainer(model, data, config, force_cpu=args.force_cpu)
    checkpoints = RunCheckpoints(folder, config, base_hash)
    first_step = 1 + checkpoints.resume(trainer, args.resume_from) if args.resume_from else 1
    sampling = build_sampling(config, model.schedule) | ({} if args.sample_with_guidance else {"cfg_scale": 1.0})

    save_config(folder, config)
    try:
        with Records(folder, first_step, config.training.num_training_steps) as records:

            def on_checkpoint(step: int) -> None:
                path = checkpoints.save(trainer, step)
                picture = folder / "samples" / f"sample-{step}.png"
                records.image("samples", draw_preview(model, data.prompts, sampling, picture, f"step {step}"), step)
                records.say(f"step {step}: {path} ({path.stat().st_size:,} bytes), {picture}")

            fit(trainer, first_step=first_step, on_step=records.step, on_checkpoint=on_checkpoint)
        assert base_hash in (None, content_hash(model.base_weights())), "a LoRA run changed its frozen base"
    except TrainingDiverged as error:
        last = checkpoints.newest() or "none"
        print(f"error: training stopped, {error}; last good checkpoint: {last}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
