"""Reading and writing a LoRA file of any kind, and the learned tokens beside one that has no place for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from xdiffusion.checkpoints.component_names import exchange_name, of_pipeline
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import diffusers, kohya, native, peft, positions
from xdiffusion.checkpoints.lora_formats.factors import check_tensor, fit, folded, rounded
from xdiffusion.checkpoints.lora_formats.formats import FORMATS
from xdiffusion.checkpoints.lora_formats.keys import Loose, sorted_by_key
from xdiffusion.checkpoints.lora_formats.layer_table import LayerTable, sd_base_of, sd_layer_table
from xdiffusion.checkpoints.paths import PICKLED, SAFETENSORS, existing_weights, refuse_leftover
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors, widened
from xdiffusion.checkpoints.writing import save_pickled


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
        lora = _read_list(content, path, names) if isinstance(content, list) else _read_keys(content, metadata, path, names)
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
    if format != "native" and (format != "peft" or of_pipeline(modules)):
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
    loose = sorted_by_key({str(key): widened(tensor.detach()) for key, tensor in content.items()}, metadata, path)
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
        raise CheckpointError(f"{path} has peft's keys: its alphas are in {peft.CONFIG}; give the folder that holds both")
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
