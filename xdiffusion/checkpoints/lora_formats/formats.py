"""The kinds of LoRA files: what each can say, and who writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xdiffusion.checkpoints.drawing_settings import drawn_by
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import diffusers, kohya, native, peft, positions


@dataclass(frozen=True)
class Format:
    """A kind of file.

    summary: for a list of formats.
    suffix: of its files; "" is a folder.
    write: (lora, path), and the table of layers where it counts_layers; None for a format that is only read.
    has_alpha, has_dora, has_tokens: what it can say.
    counts_layers: it has no names.
    words: (key, value) -> the header's entry that says how to draw, see `drawn_by`; None where there is no word for it.
    """

    summary: str
    suffix: str
    write: Callable[..., None] | None
    has_alpha: bool = True
    has_dora: bool = False
    has_tokens: bool = False
    counts_layers: bool = False
    words: Callable[[str, Any], tuple[str, str] | None] = lambda key, value: None


USUAL = {  # how a LoRA is drawn by whoever is not told
    "diffusion.prediction": "eps",
    "diffusion.schedule.kind": "betas",
    "diffusion.schedule.zero_terminal_snr": False,
    "model.text_encoder.clip_skip": 1,
}
FORMATS: dict[str, Format] = {
    "native": Format(
        "this project's: names, alphas, config, hash of the base",
        ".safetensors",
        native.write,
        has_dora=True,
        has_tokens=True,
    ),
    "kohya": Format(
        "kohya-ss/sd-scripts, A1111: lora_unet_*.lora_down.weight and .alpha",
        ".safetensors",
        kohya.write,
        has_dora=True,
        words=kohya.word,
    ),
    "diffusers": Format(
        "diffusers of today: unet.*.lora_A.weight, alphas in the header",
        ".safetensors",
        diffusers.write_peft_style,
        has_dora=True,
    ),
    "diffusers-sd15": Format(
        "diffusers' SD 1.5 scripts: unet.*.to_q.lora.down.weight",
        ".safetensors",
        diffusers.write_sd15_style,
        has_alpha=False,
    ),
    "diffusers-processors": Format(
        "diffusers' old attention processors: *.processor.to_q_lora.down.weight", ".safetensors", None
    ),
    "peft": Format(
        "a folder of adapter_model.safetensors and adapter_config.json",
        "",
        peft.write_folder,
        has_dora=True,
    ),
    "cloneofsimo": Format(
        "cloneofsimo/lora: unet:<i>:up, with learned tokens",
        ".safetensors",
        positions.write_cloneofsimo,
        has_alpha=False,
        counts_layers=True,
        has_tokens=True,
    ),
    "cloneofsimo-pt": Format(
        "cloneofsimo/lora: a pickled list, the text encoder's beside it",
        ".pt",
        positions.write_cloneofsimo_pt,
        has_alpha=False,
        counts_layers=True,
    ),
    "positional": Format(
        "a pickled list [up0, down0, ...] in the order of the model's layers",
        ".pt",
        positions.write_positional,
        has_alpha=False,
        counts_layers=True,
    ),
}


def unsaid(lora: LoRAFile, format: str) -> list[str]:
    """KEY=VALUE of how a LoRA is drawn, where it is not `USUAL` and a format has no word for it; see `drawn_by`."""
    if format == "native":
        return []
    drawn = drawn_by(lora.config).items()
    return [f"{k}={v!s:.100}" for k, v in drawn if USUAL.get(k, v) != v and FORMATS[format].words(k, v) is None]
