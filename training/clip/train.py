"""Train our own tiny CLIP on the (image, caption) pairs of a data set; its text tower conditions the diffusion models.

    python training/clip/train.py --config_path configs/image/digits/ddpm_24x24_v_continuous_clip.yaml

The file is written at the end and at once: a run that is stopped, or diverges, leaves what was there. There is nothing to
resume, for it takes seconds. training/image/train.py does the same by itself where a config says `pretrained: tiny` and
there is no such file yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xdiffusion.cli import overrides_from_flags, positive_int, run

FLAG_KEYS = {
    "dataset_name": "data.kind",
    "data_dir": "data.data_dir",
    "num_training_steps": "clip.steps",
    "seed": "training.seed",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config_path", required=True, metavar="YAML", help="a config whose model.text_encoder is of kind clip")
    add("--dataset_name", metavar="NAME", help="image/digits, image/mnist, image/fashion_mnist or image/cifar10")
    add("--data_dir", metavar="DIR", help="an existing copy of the data set; without it, it is downloaded")
    add(
        "--output_path", metavar="FILE", help="a .safetensors file; default: where training/image/train.py looks for it"
    )
    add("--num_training_steps", type=positive_int, metavar="N", help="steps (default: clip.steps of the config)")
    add("--seed", type=int, metavar="N", help="of weights and pairs")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any config key, such as clip.learning_rate=2e-3; repeatable",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from xdiffusion.build import build_data, build_text_encoder, load_config

    config = load_config(args.config_path, overrides_from_flags(args, FLAG_KEYS))
    if config.model.text_encoder.kind != "clip":
        raise ValueError(
            f"model.text_encoder.kind={config.model.text_encoder.kind}: only a text encoder of kind clip is trained here"
        )

    import torch
    from tqdm import tqdm

    from xdiffusion.checkpoints.files import ensure_writable
    from xdiffusion.training.divergence import TrainingDiverged
    from xdiffusion.training.run import OUTPUT_ROOT
    from xdiffusion.training.text_encoder import tiny_clip_path, train_tiny_clip

    path = Path(args.output_path) if args.output_path else tiny_clip_path(config, OUTPUT_ROOT)
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"--output_path {path} must name a .safetensors file")
    ensure_writable(path.parent)
    data = build_data(config)
    torch.manual_seed(config.training.seed)
    encoder = build_text_encoder(config)
    with tqdm(total=config.clip.steps, desc="tiny CLIP", unit="step") as bar:

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        try:
            train_tiny_clip(encoder, config, data, path, on_step=on_step, say=bar.write)
        except TrainingDiverged as error:
            bar.close()
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
