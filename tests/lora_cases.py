"""What the tests of the LoRA commands share: running a command line, LoRAs to run it on, and their updates."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lora_files import applied
from PIL import Image

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, sd_layer_table, write_lora
from xdiffusion.cli import run
from xdiffusion.commands import lora, lora_add

COMMANDS = {"lora": lora.main, "lora_add": lora_add.main}
SAMPLING = ["--num_samples", 2, "--seed", 1]


def command(line: str) -> int:
    name, *words = shlex.split(line)
    try:
        return run(COMMANDS[name], words)
    except SystemExit as stop:  # argparse
        return stop.code


def factors(shape, rank=2, alpha=3.0, seed=0, size=1.0) -> LoRAFactors:
    generator = torch.Generator().manual_seed(seed)
    lora_A = size * torch.randn(rank, *shape[1:], generator=generator)
    return LoRAFactors(lora_A, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator), alpha)


def relative(result, exact) -> float:
    return float((result - exact).norm() / exact.norm())


def deltas(path) -> dict[str, torch.Tensor]:
    """The updates in a file, each as `applied`, which is linear in the update."""
    return {exchange_name(n): applied(f.lora_A, f.lora_B, f.scaling) for n, f in read_lora(path).modules.items()}


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def write_files(tiny_run, folder: Path) -> None:
    """model.safetensors, LoRAs of it that change a picture, and LoRAs for Stable Diffusion 1.5, in a folder."""
    (folder / "model.safetensors").symlink_to(tiny_run.checkpoint)
    trained = read_lora(tiny_run.lora)
    for seed, name in enumerate(("style", "ink")):
        modules = {
            n: factors((f.lora_B.shape[0], *f.lora_A.shape[1:]), seed=10 * i + seed, size=0.3)
            for i, (n, f) in enumerate(trained.modules.items())
        }
        write_lora(replace(trained, modules=modules), folder / f"{name}.safetensors", "native")
    attention = {n: s for n, s in sd_layer_table("sd15").items() if re.search(r"attn[12]\.to_|ff\.net\.0|self_attn", n)}
    for seed, name in enumerate(("sd_style", "sd_ink")):
        modules = {n: factors(s, rank=1, alpha=1.0, seed=10 * i + seed) for i, (n, s) in enumerate(attention.items())}
        write_lora(LoRAFile(modules), folder / f"{name}.safetensors", "kohya")
