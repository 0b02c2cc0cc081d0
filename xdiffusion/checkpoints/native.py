"""This project's own model files: safetensors whose header says what they are.

Header: format, version (of the package), config (resolved, JSON), step, image_shape. The files of LoRAs, which share the
first four entries, are in `lora_formats`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.paths import (
    PICKLED,
    SAFETENSORS,
    existing_weights,
    is_adapter_folder,
    is_pipeline_folder,
    weights_file,
)
from xdiffusion.checkpoints.reading import load_pickled
from xdiffusion.checkpoints.stable_diffusion_files import StableDiffusionFile, read_stable_diffusion
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.checkpoints.writing import save_safetensors

MODEL_FORMAT = "xdiffusion-model"
LORA_FORMAT = "xdiffusion-lora"
_OF_A_LORA = re.compile(r"[._]lora[._]|\.(hada|lokr)_|^\w+:\d+:(up|down)$")  # a key of any format


@dataclass(frozen=True)
class ModelFile:
    """A model as read: tensors by our names, and what the header says (None where the file has no header of ours).

    stable_diffusion: what else is known of a file of Stable Diffusion as others write it.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    image_shape: tuple[int, int, int] | None
    step: int
    stable_diffusion: StableDiffusionFile | None = None

    @property
    def words(self) -> Mapping[str, Tensor]:
        """Learned words that are in it, (n, width) each: only a folder of diffusers has a place for them."""
        return self.stable_diffusion.words if self.stable_diffusion else {}


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
    entries = header(MODEL_FORMAT, config, step) | {"image_shape": json.dumps(image_shape)}
    save_safetensors(path, tensors, entries)


def load_model_file(path: Path, ema: bool | None = None) -> ModelFile:
    """Read a model checkpoint: ours, or Stable Diffusion as others write it. The tensors of safetensors files are mapped.

    Args:
        path: a safetensors file, a `.pt` or `.ckpt` of plain tensors, or a diffusers folder.
        ema: see `read_stable_diffusion`; a file of ours holds one set of weights.

    Raises:
        CheckpointError: if it is missing, unreadable, or a LoRA, or `ema` asks for what it does not hold.
    """
    path, _ = existing_weights(path)
    if is_adapter_folder(path) and not is_pipeline_folder(path):
        raise _is_a_lora(path)
    if found := read_stable_diffusion(path, ema):
        return ModelFile(path, found.tensors, None, None, 0, found)
    if ema is not None:
        raise CheckpointError(f"{path} holds one set of weights: --ema and --no-ema are for files of Stable Diffusion")
    if path.suffix in PICKLED:
        flat = _flat_tensors(load_pickled(path), path)
        if any(map(_OF_A_LORA.search, flat)):
            raise _is_a_lora(path)
        return ModelFile(path, flat, None, None, 0)
    stored = StoredTensors(path)
    tensors, metadata = dict(stored), stored.metadata
    if metadata.get("format") == LORA_FORMAT or any(map(_OF_A_LORA.search, tensors)):
        raise _is_a_lora(path)
    with reading_header(path):
        config = json.loads(metadata["config"]) if "config" in metadata else None
        shape = tuple(json.loads(metadata["image_shape"])) if "image_shape" in metadata else None
        if not isinstance(config, dict | None) or (shape and [type(side) for side in shape] != [int] * 3):
            raise TypeError(f"config={config!r:.100}, image_shape={shape!r:.100}")
        return ModelFile(path, tensors, config, shape, int(metadata.get("step", 0)))


def lora_file(path: str | Path) -> Path:
    """`weights_file` for a LoRA.

    Raises:
        CheckpointError: if there is none, or it is a model.
    """
    found = weights_file(path, "LoRA")
    is_model = is_pipeline_folder(found)
    if found.suffix == SAFETENSORS and found.is_file():
        stored = StoredTensors(found)
        is_original = any(name.startswith("model.diffusion_model.") for name in stored)
        is_model = is_original or stored.metadata.get("format") == MODEL_FORMAT
    if is_model:
        raise CheckpointError(f"{found} is a model, not a LoRA: sample.py takes it as --checkpoint")
    return found


def header(kind: str, config: Mapping[str, Any], step: int) -> dict[str, str]:
    """What every file of ours says of itself."""
    text = json.dumps(config, separators=(",", ":"))
    return {"format": kind, "version": package_version(), "config": text, "step": str(step)}


@contextmanager
def reading_header(path: Path) -> Iterator[None]:
    """Turn whatever the parsing of a damaged header or config hits into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({type(error).__name__}: {error})") from error


def _is_a_lora(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a LoRA, not a model: sample.py and evaluate.py take it as --lora_path, beside its base model; to go on "
        "training it, name it with --resume_from and --use_lora_training"
    )


def _flat_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, at the top or under "state_dict" / "model"."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    if not named or not content:
        raise CheckpointError(f"{path} holds no state dict of named tensors")
    return content
