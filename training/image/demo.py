"""The whole story in minutes on two CPU cores: a tiny CLIP, a base model, a LoRA on it, pictures and scores.

    python training/image/demo.py            (what `make demo` runs)

Each stage is one of the commands that the README teaches, printed as one would type it. Everything is written to
output/demo: pictures, checkpoints, and metrics.json with the seconds of each stage and the scores of both models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xdiffusion.cli import REPOSITORY, Parser, call_script, positive_int, run, two_or_more
from xdiffusion.places import OUTPUT_ROOT

CONFIG = REPOSITORY / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output_path", type=Path, default=OUTPUT_ROOT / "demo", metavar="DIR", help="default: output/demo")
    add(
        "--num_training_steps",
        type=positive_int,
        metavar="N",
        help="of base and LoRA each, for a trial run (default: the config's)",
    )
    add("--num_samples", type=two_or_more, default=1000, metavar="N", help="samples that are scored (1000)")
    add("--seed", type=int, default=0, metavar="N", help="of the trainings; scores and pictures are of the same noise")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from xdiffusion.build import load_config
    from xdiffusion.checkpoints.writing import write_text

    folder = args.output_path
    steps = [f"--num_training_steps={args.num_training_steps}"] if args.num_training_steps else []
    base_steps, lora_steps = (
        args.num_training_steps or load_config(CONFIG, (), lora).training.num_training_steps for lora in (False, True)
    )
    clip = folder / "clip.safetensors"
    base = folder / "base" / f"diffusion-{base_steps}.safetensors"
    lora = folder / "lora" / f"diffusion-{lora_steps}-lora.safetensors"
    common = ["--config_path", CONFIG, "--seed", args.seed]
    train = ["training/image/train.py", *common, *steps]
    score = ["sampling/image/evaluate.py", "--checkpoint", base, "--num_samples", args.num_samples, "--json"]
    seconds: dict[str, float] = {}

    with stage("clip", seconds):
        call_script("training/clip/train.py", *common, "--output_path", clip)
    with stage("base", seconds):
        call_script(*train, "--output_path", base.parent, "--set", f"model.text_encoder.pretrained={clip}")
    hash_before = base_hash(base)
    with stage("lora", seconds):
        adapt = ["--use_lora_training", "--load_model_weights_from_checkpoint", base, "--output_path", lora.parent]
        call_script(*train, "--dataset_name", "image/digits_inverted", *adapt)
    with stage("sample", seconds):
        # scored with the config's guidance, which keeps the data's variety; looked at with more, which draws cleaner digits
        draw = ["--num_samples", 40, "--save_trajectory", "--guidance", 3, "--sampling_steps", 20]
        draw += ["--paired", 0.8, 1.2]  # half-way to inverted digits there is no picture to be learned
        draw += ["--lora_path", lora, "--output_path", folder]
        call_script("sampling/image/sample.py", "--checkpoint", base, *draw)
    with stage("evaluate", seconds):
        base_scores = call_script(*score, "--dataset_name", "image/digits")
        lora_scores = call_script(*score, "--dataset_name", "image/digits_inverted", "--lora_path", lora)

    metrics = {
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
        "base": json.loads(base_scores),
        "lora": json.loads(lora_scores),
        "lora_file_bytes": lora.stat().st_size,
        "base_unchanged": hash_before == base_hash(base) == trained_on(lora),
        "scale0_identical": scale0_identical(base, lora),
    }
    text = json.dumps(metrics, indent=2) + "\n"
    write_text(folder / "metrics.json", text)
    print(text)
    return 0


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float]):
    """Time a stage."""
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


def base_hash(checkpoint: Path) -> str:
    """The content hash of a checkpoint's weights."""
    from xdiffusion.checkpoints.hashes import content_hash
    from xdiffusion.checkpoints.native import load_model_file

    return content_hash(load_model_file(checkpoint).tensors)


def trained_on(lora: Path) -> str | None:
    """The hash of the base that a LoRA run held at its start; the run itself checks that it is the same at its end."""
    from xdiffusion.checkpoints.lora_formats import read_lora

    return read_lora(lora).base_hash


def scale0_identical(base: Path, lora: Path) -> bool:
    """Whether the model with the LoRA at scale 0 draws bit for bit what the model without it draws."""
    import torch

    from xdiffusion.build import build_sampling
    from xdiffusion.loading import load_model
    from xdiffusion.lora import load_lora_weights
    from xdiffusion.model import generate, generators_for

    model, config = load_model(base)
    sampling = build_sampling(config, model.schedule)
    prompts = [str(digit) for digit in range(10)]
    before = generate(model, prompts, generators_for(0, 10), **sampling)
    load_lora_weights(model, lora, scale=0.0)
    return torch.equal(before, generate(model, prompts, generators_for(0, 10), **sampling))


if __name__ == "__main__":
    sys.exit(run(main, lasting=True))
