"""LoRA files of every kind that people have, read to and written from one `LoRAFile`.

    read_lora(path) -> LoRAFile        the format is recognised from the file
    write_lora(lora, path, format)     by name, see `FORMATS`

Every product scaling * B A survives every conversion. A format without a place for alpha gets it folded into lora_B; one
without a place for learned tokens gets them in `<name>.ti.pt` beside it; one that cannot say something else says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.drawn_by import drawn_by
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import diffusers, kohya, native, peft, positions
from xdiffusion.checkpoints.lora_formats.factors import check_tensor, fit, folded, rounded
from xdiffusion.checkpoints.lora_formats.keys import Loose, sorted_by_key
from xdiffusion.checkpoints.lora_formats.layer_table import SD_BASES, LayerTable, sd_base_of, sd_layer_table
from xdiffusion.checkpoints.paths import PICKLED, SAFETENSORS, existing_weights, refuse_leftover
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors
from xdiffusion.checkpoints.writing import save_pickled

__all__ = [
    "FORMATS",
    "SD_BASES",
    "Format",
    "LayerTable",
    "read_lora",
    "save_tokens_beside",
    "sd_layer_table",
    "tokens_path",
    "unsaid",
    "write_lora",
]


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


def read_lora(path: Path, names: LayerTable | None = None) -> LoRAFile:
    """Read a LoRA of any format.

    Args:
        path: of a file, or of a peft folder.
        names: the layers of the model it is for; needed for models other than Stable Diffusion 1.x and 2.x where the
            format flattens names or counts layers.

    Raises:
        CheckpointError: if it is missing, damaged, of no known format, or does not fit the layers.
    """
    path, _ = existing_weights(Path(path))
    if path.is_dir():
        lora = peft.read_folder(path)
    else:
        content, metadata = _content(path)
        lora = (
            _read_list(content, path, names)
            if isinstance(content, list)
            else _read_keys(content, metadata, path, names)
        )
    if not FORMATS[lora.format].has_tokens:
        lora = replace(lora, tokens={**lora.tokens, **_tokens_beside(path)})
    for token, vector in lora.tokens.items():
        check_tensor(vector, token, path)
    lora = replace(lora, path=path)
    if lora.format == "native":
        return lora
    repairs = list(lora.repairs)
    table = names or _sd_table(lora.modules)
    modules = fit(lora.modules, table, path, repairs) if table else lora.modules
    return replace(lora, modules=modules, repairs=tuple(repairs))


def write_lora(
    lora: LoRAFile,
    path: Path,
    format: str,
    names: LayerTable | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA in a format, atomically.

    Args:
        path: of the file; of the folder for "peft".
        format: a key of FORMATS.
        names: see `read_lora`.
        dtype: of the factors; None keeps each as it is.

    Raises:
        CheckpointError: if the format is unknown, only read, or cannot hold this LoRA, or the file cannot be written.
    """
    writable = [name for name, kind in FORMATS.items() if kind.write]
    if format not in writable:
        raise CheckpointError(f"LoRA format {format!r} is none that is written here: {', '.join(writable)}")
    kind, path = FORMATS[format], Path(path)
    if kind.suffix and (path.suffix in PICKLED) != (kind.suffix in PICKLED):
        raise CheckpointError(f"{path}: the format {format} is written as {kind.suffix}; name such a file")
    if not kind.suffix and path.suffix in (SAFETENSORS, *PICKLED):
        raise CheckpointError(f"{path}: the format {format} is a folder; name one without {path.suffix}")
    if not lora.modules:
        raise CheckpointError(f"{path} is not written: the LoRA holds no factors")
    modules = dict(lora.modules)
    if format != "native":
        modules = {exchange_name(name): factors for name, factors in modules.items()}
        if len(modules) < len(lora.modules):
            raise CheckpointError(f"the format {format} has one name for two of the {len(lora.modules)} modules")
    if not kind.has_dora and any(f.magnitude is not None for f in modules.values()):
        raise CheckpointError(f"the format {format} cannot hold DoRA's magnitudes")
    if not kind.has_alpha:
        modules = {name: folded(factors) for name, factors in modules.items()}
    if dtype is not None:
        modules = {name: rounded(factors, dtype, name) for name, factors in modules.items()}
    carried = {k: v for k, v in lora.metadata.items() if k.startswith(("ss_", "modelspec."))}
    lora = replace(lora, modules=modules, metadata=carried)
    if not kind.has_tokens and not lora.tokens:
        refuse_leftover(tokens_path(path))
    kind.write(lora, path, names) if kind.counts_layers else kind.write(lora, path)
    if not kind.has_tokens and lora.tokens:
        save_tokens_beside(path, lora.tokens)


def tokens_path(path: Path) -> Path:
    """Where the learned tokens are of what has no place for them: style.pt -> style.ti.pt, a folder v1.5 -> v1.5.ti.pt."""
    if path.suffix in (SAFETENSORS, *PICKLED, ".json"):
        return path.with_suffix(".ti.pt")
    path = path if path.name not in ("", "..") else path.resolve()
    return path.with_name(f"{path.name}.ti.pt")


def save_tokens_beside(path: Path, tokens: Mapping[str, torch.Tensor]) -> Path:
    """Write learned tokens into the `tokens_path` of a file or folder, atomically; returns it."""
    beside = tokens_path(path)
    save_pickled(beside, {name: vector.detach().clone() for name, vector in tokens.items()})
    return beside


def unsaid(lora: LoRAFile, format: str) -> list[str]:
    """KEY=VALUE of how a LoRA is drawn, where it is not `USUAL` and a format has no word for it; see `drawn_by`."""
    if format == "native":
        return []
    drawn = drawn_by(lora.config).items()
    return [f"{k}={v!s:.100}" for k, v in drawn if USUAL.get(k, v) != v and FORMATS[format].words(k, v) is None]


def _content(path: Path) -> tuple[object, dict[str, str]]:
    """Named tensors or a list of them, and metadata."""
    if path.suffix == ".json":
        return positions.load_json(path), {}
    if path.suffix not in PICKLED:
        return load_safetensors(path)
    content = load_pickled(path)
    nested = content.get("state_dict") if isinstance(content, dict) else None
    return content if nested is None else nested, {}


def _read_keys(content, metadata: dict[str, str], path: Path, names: LayerTable | None) -> LoRAFile:
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise CheckpointError(f"{path} is not a LoRA file: it holds neither named tensors nor a list of them")
    loose = sorted_by_key({str(key): tensor.detach() for key, tensor in content.items()}, metadata, path)
    if loose.dialect == "native":
        return native.read(loose, metadata, path)
    modules = _modules(loose, metadata, path, names)
    return LoRAFile(modules, loose.dialect, loose.tokens, metadata, tuple(loose.repairs))


def _modules(loose: Loose, metadata: dict[str, str], path: Path, names: LayerTable | None) -> dict[str, LoRAFactors]:
    if loose.dialect == "kohya":
        return kohya.read(loose, path, names)
    if loose.dialect == "cloneofsimo":
        return positions.read_cloneofsimo(loose, path, names)
    if loose.dialect == "peft":
        raise CheckpointError(
            f"{path} has peft's keys: its alphas are in {peft.CONFIG}; give the folder that holds both"
        )
    return diffusers.read(loose, metadata, path)


def _read_list(content: list, path: Path, names: LayerTable | None) -> LoRAFile:
    format, modules, repairs = positions.read_list(content, path, names)
    return LoRAFile(modules, format, repairs=tuple(repairs))


def _tokens_beside(path: Path) -> dict[str, torch.Tensor]:
    beside = tokens_path(path)
    if not beside.is_file():
        return {}
    tokens = load_pickled(beside)
    if not isinstance(tokens, dict) or not all(isinstance(t, torch.Tensor) for t in tokens.values()):
        raise CheckpointError(f"{beside} holds no learned tokens by name")
    return {str(name): vector.detach() for name, vector in tokens.items()}


def _sd_table(modules: dict[str, LoRAFactors]) -> LayerTable | None:
    flat = {name: (f.lora_B.shape[0], prod(f.lora_A.shape[1:])) for name, f in modules.items()}
    base = sd_base_of(flat)
    return sd_layer_table(base) if base else None
