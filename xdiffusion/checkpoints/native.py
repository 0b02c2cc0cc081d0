"""This project's own files: a model or a LoRA as safetensors, whose header says what they are.

Header of both: format, version (of the package), config (resolved, JSON), step. A model adds image_shape; a LoRA adds
lora_alpha of each module and base_hash, the content hash of the model it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.files import (
    PICKLED,
    CheckpointError,
    existing_weights,
    load_pickled,
    load_safetensors,
    save_safetensors,
)

MODEL_FORMAT = "xdiffusion-model"
LORA_FORMAT = "xdiffusion-lora"


@dataclass(frozen=True)
class ModelFile:
    """A model as read: tensors by name, and what the header says (None where the file has no header of ours)."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    image_shape: tuple[int, int, int] | None
    step: int


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA as written or read: factors by `module.lora_A` / `module.lora_B`, lora_alpha by module, and its origin."""

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    base_hash: str | None = None
    config: dict[str, Any] | None = None
    step: int = 0
    extra: dict[str, str] = field(default_factory=dict)


def package_version() -> str:
    """The installed version of xdiffusion."""
    try:
        return version("xdiffusion")
    except PackageNotFoundError:
        return "unknown"


def save_model(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    step: int,
) -> None:
    """Write a model checkpoint atomically."""
    header = _header(MODEL_FORMAT, config, step) | {"image_shape": json.dumps(image_shape)}
    save_safetensors(path, tensors, header)


def load_model_file(path: Path) -> ModelFile:
    """Read a model checkpoint of ours: safetensors, or a `.pt` of plain tensors by our names.

    Raises:
        CheckpointError: if it is missing, unreadable, or a LoRA.
    """
    path, _ = existing_weights(path)
    if path.suffix in PICKLED:
        return ModelFile(path, _flat_tensors(load_pickled(path), path), None, None, 0)
    tensors, metadata = load_safetensors(path)
    if metadata.get("format") == LORA_FORMAT or any(".lora_" in name for name in tensors):
        raise CheckpointError(f"{path} is a LoRA; it goes to --lora_path, and its base model to --checkpoint")
    with _header_of(path):
        config = json.loads(metadata["config"]) if "config" in metadata else None
        shape = tuple(json.loads(metadata["image_shape"])) if "image_shape" in metadata else None
        return ModelFile(path, tensors, config, shape, int(metadata.get("step", 0)))


def save_lora(path: Path, lora: LoRAFile) -> None:
    """Write a LoRA atomically."""
    header = _header(LORA_FORMAT, lora.config or {}, lora.step) | lora.extra
    header["lora_alpha"] = json.dumps(_compact(lora.alphas))
    if lora.base_hash:
        header["base_hash"] = lora.base_hash
    save_safetensors(path, lora.tensors, header)


def load_lora(path: Path) -> LoRAFile:
    """Read a LoRA of ours.

    Raises:
        CheckpointError: if it is missing, unreadable, or not of our format.
    """
    path, _ = existing_weights(path)
    if path.suffix in PICKLED:
        raise CheckpointError(f"{path} is not a LoRA file of this project (safetensors)")
    tensors, metadata = load_safetensors(path)
    if metadata.get("format") != LORA_FORMAT:
        raise CheckpointError(f"{path} is not a LoRA file of this project: its header names no {LORA_FORMAT} format")
    with _header_of(path):
        modules = {name.rpartition(".")[0] for name in tensors}
        alphas = _expand(json.loads(metadata["lora_alpha"]), modules)
        config = json.loads(metadata["config"]) or None
        return LoRAFile(tensors, alphas, metadata.get("base_hash"), config, int(metadata["step"]))


def _header(kind: str, config: Mapping[str, Any], step: int) -> dict[str, str]:
    text = json.dumps(config, separators=(",", ":"))
    return {"format": kind, "version": package_version(), "config": text, "step": str(step)}


def _compact(alphas: Mapping[str, float]) -> Any:
    """One number where all modules agree, else a number per module."""
    values = set(alphas.values())
    return values.pop() if len(values) == 1 else dict(alphas)


def _expand(alphas: Any, modules: set[str]) -> dict[str, float]:
    return {m: float(alphas[m]) for m in modules} if isinstance(alphas, dict) else dict.fromkeys(modules, float(alphas))


def _flat_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, at the top or under "state_dict" / "model"."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict of named tensors")
    return content


@contextmanager
def _header_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({type(error).__name__}: {error})") from error
