"""What the LoRA commands share: reading with repairs told, merging with errors told, writing in the format asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from xdiffusion.checkpoints.component_names import component_of, exchange_name
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import (
    FORMATS,
    SD_BASES,
    LayerTable,
    read_lora,
    sd_layer_table,
    tokens_path,
    unsaid,
    write_lora,
)
from xdiffusion.checkpoints.native import lora_file
from xdiffusion.checkpoints.paths import PICKLED, SAFETENSORS
from xdiffusion.commands.report import text_table
from xdiffusion.lora.merge import merge_loras


def layer_table(model: str | None) -> LayerTable | None:
    """The layers of the model that `--base` names.

    Raises:
        ConfigError: if it is neither Stable Diffusion nor a config.
    """
    if model is None:
        return None
    if model in SD_BASES:
        return sd_layer_table(model)
    from xdiffusion.build import build_model, load_config

    with torch.device("meta"):
        built = build_model(load_config(model))
    return LayerTable.of(built)


def read(path: str | Path, names: LayerTable | None) -> LoRAFile:
    """A LoRA of any format; what had to be mended is told on stderr.

    Raises:
        CheckpointError: if it is missing, damaged, or needs `names`.
    """
    path = lora_file(path)
    lora = read_lora(path, names)
    for repair in lora.repairs:
        print(f"{path}: {repair}", file=sys.stderr)
    return lora


def write(lora: LoRAFile, path: str | Path, format: str, names: LayerTable | None, dtype: str | None = None) -> None:
    """Write a LoRA and tell so.

    Raises:
        CheckpointError: for an unknown format, or a LoRA that the format cannot hold.
    """
    write_lora(lora, Path(path), format, names=names, dtype=getattr(torch, dtype) if dtype else None)
    print(f"{path}: {len(lora.modules)} modules, {format}")
    if lora.tokens and not FORMATS[format].has_tokens:
        print(f"{tokens_path(Path(path))}: its learned words {', '.join(lora.tokens)}, for which {format} has no place")
    if lost := unsaid(lora, format):
        print(f"{path}: it was trained with {', '.join(lost)}, which {format} has no word for", file=sys.stderr)


def merge_and_write(
    parts: Sequence[tuple[LoRAFile, float]],
    output: str,
    names: LayerTable | None,
    method: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    format: str | None = None,
    dtype: str | None = None,
) -> None:
    """`merge_loras`, print errors and renamed words, and write the result, by default in the format of the first part.

    Raises:
        ValueError: see `merge_loras` and `write`.
    """
    loras, weights = zip(*parts)
    parts = list(zip(_in_one_spelling(loras), weights))
    merged, errors = merge_loras(parts, method, rank=rank, energy=energy, progress=progress("merging"))
    if merged.base_hash is None and any(lora.base_hash for lora in loras):
        print("the LoRAs do not all name the same base, so the result names none", file=sys.stderr)
    for repair in merged.repairs:
        print(f"{output}: {repair}", file=sys.stderr)
    rows = [(name, merged.modules[name].rank, f"{e:.1e}", f"{e * e:.1e}") for name, e in errors.items()]
    heads = ("layer", "rank", "relative error", "discarded energy")
    print(text_table(heads, rows) if method == "svd" else text_table(heads[:3], [row[:3] for row in rows]))
    print(f"{method}: largest relative error {max(errors.values()):.1e}")
    write(merged, output, format or _output_format(loras[0], Path(output)), names, dtype)


def with_files_beside(path: Path) -> list[Path]:
    """The file of a LoRA, and those that a format keeps beside it: learned words, and cloneofsimo's text encoder."""
    return [path, tokens_path(path), path.with_suffix(".text_encoder.pt")] if path.name else [path]


def progress(description: str) -> Callable[[Iterable[str]], Iterable[str]]:
    """A bar over names on stderr, where that is a terminal."""
    from tqdm import tqdm

    return partial(tqdm, desc=description, disable=None, leave=False)


def _output_format(lora: LoRAFile, path: Path) -> str:
    """The format to write where none is asked for: that of the LoRA, where the file's name and the format allow it."""
    kind = FORMATS[lora.format]
    if kind.write and kind.suffix in (path.suffix, SAFETENSORS) and path.suffix not in PICKLED:
        return lora.format
    if path.suffix == ".pt":
        return lora.format if kind.suffix == ".pt" else "cloneofsimo-pt"
    of_sd = all(component_of(exchange_name(name)) for name in lora.modules)
    return "diffusers" if of_sd or not kind.write else "native"


def _in_one_spelling(loras: Sequence[LoRAFile]) -> list[LoRAFile]:
    """The LoRAs, with the exchange formats' names if some of them name a layer in our way and others in theirs."""
    names = {name for lora in loras for name in lora.modules}
    if len({exchange_name(name) for name in names}) == len(names):
        return list(loras)
    return [replace(lora, modules={exchange_name(n): f for n, f in lora.modules.items()}) for lora in loras]
