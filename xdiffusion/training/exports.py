"""The LoRA of a Stable Diffusion run in the forms that other tools read, beside our own file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from xdiffusion.checkpoints.learned_tokens import save_learned_tokens
from xdiffusion.checkpoints.lora_formats import read_lora, unsaid, write_lora

EXPORTED = ("diffusers", "kohya")
TOKENS = "tokens"


def export_lora(path: Path) -> list[Path]:
    """Write <name>-diffusers and <name>-kohya, and its learned tokens, if any, as <name>-tokens; returns the paths.

    What a format has no word for, above all a prediction other than eps, is told on stderr.

    Args:
        path: of a LoRA file of ours, for a latent diffusion model.

    Raises:
        CheckpointError: if a format cannot hold it, or a file cannot be written.
    """
    lora = read_lora(path)
    for format in EXPORTED:
        export = export_path(path, format)
        write_lora(replace(lora, tokens={}), export, format)
        if lost := unsaid(lora, format):
            print(f"{export}: it was trained with {', '.join(lost)}, which {format} has no word for", file=sys.stderr)
    if lora.tokens:
        save_learned_tokens(export_path(path, TOKENS), lora.tokens)
    return [path for path in export_paths(path) if path.is_file()]


def export_paths(path: Path) -> list[Path]:
    """Where everything that `export_lora` may write goes."""
    return [export_path(path, kind) for kind in (*EXPORTED, TOKENS)]


def export_path(path: Path, kind: str) -> Path:
    """diffusion-N-lora.safetensors -> diffusion-N-lora-kohya.safetensors."""
    return path.with_name(f"{path.stem}-{kind}{path.suffix}")
