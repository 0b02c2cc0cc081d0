"""This project's own LoRA files: safetensors with `module.lora_A`, `module.lora_B` by the model's own names.

Header: format, version (of the package), rank and lora_alpha (one number, or one for each module), use_rslora where it
is so, base_hash (content hash of the model it was trained on), base_sample (a few values of each weight that it adapts, by
module), config (resolved), step. Learned tokens are `token:NAME`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats.factors import assemble
from xdiffusion.checkpoints.lora_formats.keys import TOKEN, Loose
from xdiffusion.checkpoints.native import LORA_FORMAT, header, reading_header
from xdiffusion.checkpoints.paths import SAFETENSORS
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.checkpoints.writing import save_safetensors


def read(loose: Loose, metadata: Mapping[str, str], path: Path) -> LoRAFile:
    """A LoRA of ours, today's or an older file's."""
    if metadata.get("format") != LORA_FORMAT:
        raise CheckpointError(f"{path} is not a LoRA file of this project: its header names no {LORA_FORMAT} format")
    with reading_header(path):
        alphas = json.loads(metadata["lora_alpha"])
        use_rslora = json.loads(metadata.get("use_rslora", "false"))
        config, step = _config_in(metadata), int(metadata["step"])

        def alpha_of(module: str, rank: int) -> tuple[float, bool]:
            return float(_of(alphas, module)), bool(_of(use_rslora, module))

        modules = assemble(loose.parts, path, loose.repairs, alpha_of)
        sample = json.loads(metadata.get("base_sample", "{}"))
        sample = {module: [float(value) for value in values] for module, values in sample.items()}
    repairs, base_hash = tuple(loose.repairs), metadata.get("base_hash")
    return LoRAFile(modules, "native", loose.tokens, metadata, repairs, base_hash, sample, config, step)


def trained_config(path: Path) -> dict[str, Any] | None:
    """The config of the run that trained a LoRA of ours, without reading the LoRA; None where a file does not say.

    Raises:
        CheckpointError: if the file is damaged.
    """
    metadata = StoredTensors(path).metadata if path.suffix == SAFETENSORS and path.is_file() else {}
    with reading_header(path):
        return _config_in(metadata) if metadata.get("format") == LORA_FORMAT else None


def _config_in(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    config = json.loads(metadata["config"])
    if not isinstance(config, dict | None):
        raise TypeError(f"config={config!r:.100}")
    return config or None


def write(lora: LoRAFile, path: Path) -> None:
    """Write a LoRA atomically, with the entries of other tools in `metadata`."""
    tensors: dict[str, Tensor] = {f"{TOKEN}{name}": vector for name, vector in lora.tokens.items()}
    for name, factors in lora.modules.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = factors.lora_A, factors.lora_B
        if factors.magnitude is not None:
            tensors[f"{name}.lora_magnitude"] = factors.magnitude
    entries = {**lora.metadata, **header(LORA_FORMAT, lora.config or {}, lora.step)}
    entries["rank"] = json.dumps(_compact({name: f.rank for name, f in lora.modules.items()}))
    entries["lora_alpha"] = json.dumps(_compact({name: f.lora_alpha for name, f in lora.modules.items()}))
    if any(f.use_rslora for f in lora.modules.values()):
        entries["use_rslora"] = json.dumps(_compact({name: f.use_rslora for name, f in lora.modules.items()}))
    if lora.base_hash:
        entries["base_hash"] = lora.base_hash
    if lora.base_sample:
        entries["base_sample"] = json.dumps(dict(lora.base_sample), separators=(",", ":"))
    save_safetensors(path, tensors, entries)


def _compact(values: Mapping[str, Any]) -> Any:
    """One value where all modules agree, else a value for each."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else dict(values)


def _of(values: Any, module: str) -> Any:
    return values[module] if isinstance(values, dict) else values
