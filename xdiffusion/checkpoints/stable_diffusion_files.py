"""Stable Diffusion's files as others write them, read under our names: which model it is, and its tensors, still unread.

    original    one file, .safetensors or .ckpt, with the names of `stable_diffusion`
    diffusers   a folder with unet/, vae/ and text_encoder/, each one file or several with an index

The shapes tell the architecture. Whether a 2.x model predicts eps or v they do not tell: that is in the scheduler's
settings of a folder, in the header of a file that says so, or in the file's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from xdiffusion.checkpoints.diffusers import (
    autoencoder_from_diffusers,
    text_encoder_from_transformers,
    unet_from_diffusers,
)
from xdiffusion.checkpoints.files import PICKLED, CheckpointError, is_pipeline_folder, load_pickled
from xdiffusion.checkpoints.stable_diffusion import UNET, from_original, with_text_projection
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.checkpoints.weight_index import read_indexed

PREDICTION_KEY = "modelspec.prediction_type"  # of a file's header, as the field's model specification names it
_ARCHITECTURES = {  # (width of the UNet's first level, width of the text embedding)
    (320, 768): "sd15",
    (320, 1024): "sd21",
    (16, 16): "sd15_tiny",
    (16, 24): "sd21_tiny",
}
_PREDICTIONS = {"epsilon": "eps", "eps": "eps", "v_prediction": "v", "v": "v"}
_NAME_OF_V = re.compile(r"768|v-?pred|v-ema|[_-]v(?=[_-]|$)", re.IGNORECASE)
_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
_COMPONENTS = {  # folder: (our part, its table)
    "unet": ("network", unet_from_diffusers),
    "vae": ("autoencoder", autoencoder_from_diffusers),
    "text_encoder": ("text_encoder", text_encoder_from_transformers),
}


@dataclass(frozen=True)
class StableDiffusionFile:
    """tensors: by our names, mapped. architecture: the name of its built-in config. notes: what had to be assumed."""

    tensors: dict[str, Tensor]
    architecture: str
    notes: tuple[str, ...] = ()


def read_stable_diffusion(path: Path, ema: bool = False) -> StableDiffusionFile | None:
    """What stands at a path, if it is Stable Diffusion in one of the layouts above; None for anything else.

    Args:
        path: a file or a folder.
        ema: take the moving average of the UNet's weights, of a file that holds both.

    Raises:
        CheckpointError: if it is damaged, another model of that family (XL, inpainting), or has no moving average.
    """
    if is_pipeline_folder(path):
        if ema:
            raise CheckpointError(
                f"{path}: a folder of diffusers holds one set of weights; --ema is for original files"
            )
        tensors, prediction = _folder_tensors(path), _scheduler_prediction(path)
    else:
        stored, metadata = _stored(path)
        if not any(name.startswith(UNET) for name in stored):
            return None
        try:
            tensors = from_original(stored, ema)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        prediction = _PREDICTIONS.get(metadata.get(PREDICTION_KEY, ""))
    return _recognised(path, with_text_projection(tensors), prediction)


def _recognised(path: Path, tensors: dict[str, Tensor], prediction: str | None) -> StableDiffusionFile:
    attention = "network.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    missing = [name for name in ("network.conv_in.weight", attention) if name not in tensors]
    if missing:
        raise CheckpointError(f"{path} is no Stable Diffusion 1.x or 2.x: its UNet has no {missing[0]}")
    shapes = [tuple(tensors[name].shape) for name in ("network.conv_in.weight", attention)]
    if [len(shape) for shape in shapes] != [4, 2]:
        raise CheckpointError(f"{path} is damaged: the first layers of its UNet have the shapes {shapes}")
    (width, channels, *_), found = shapes[0], (shapes[0][0], shapes[1][1])
    architecture = _ARCHITECTURES.get(found)
    if architecture is None or channels != 4:
        raise CheckpointError(
            f"{path} is no Stable Diffusion 1.x or 2.x: its UNet has first width {width}, text width {found[1]} and "
            f"{channels} input channels; known are {', '.join(f'{w}/{t}' for w, t in _ARCHITECTURES)} with 4"
        )
    family, _, tiny = architecture.partition("_")
    if family == "sd15":
        return StableDiffusionFile(tensors, architecture)
    notes = ()
    if prediction is None:
        prediction = "v" if _NAME_OF_V.search(path.stem) else "eps"
        other = {"v": "sd21_base.yaml", "eps": "sd21_v.yaml"}[prediction]
        notes = (
            f"{path} is taken to predict {prediction}, by its name; if not, --config_path configs/image/sd/{other}",
        )
    name = f"sd21_{'v' if prediction == 'v' else 'base'}"
    return StableDiffusionFile(tensors, f"{name}_{tiny}" if tiny else name, notes)


def _stored(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """A file's tensors, mapped, and its header."""
    if path.suffix not in PICKLED:
        stored = StoredTensors(path)
        return stored, stored.metadata
    content = load_pickled(path, mmap=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    named = content if isinstance(content, dict) else {}
    return {str(name): tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}, {}


def _folder_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for component, (part, table) in _COMPONENTS.items():
        path = _weight_file(folder / component)
        stored = read_indexed(path) if path.suffix == ".json" else _stored(path)[0]
        tensors |= {f"{part}.{name}": tensor for name, tensor in table(stored).items()}
    return tensors


def _weight_file(folder: Path) -> Path:
    """The weights of a component, or their index: in full precision before fp16, safetensors before pickled."""
    kinds = ("{}.safetensors", "{}.safetensors.index.json", "{}.fp16.safetensors", "{}.safetensors.index.fp16.json")
    candidates = [folder / kind.format(name) for kind in (*kinds, "{}.bin", "{}.fp16.bin") for name in _WEIGHTS]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        present = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
        raise CheckpointError(
            f"{folder} holds no weights: looked for {', '.join(p.name for p in candidates)}; there is {present}"
        )
    return found


def _scheduler_prediction(folder: Path) -> str | None:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
    except (ValueError, OSError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, str) or said not in _PREDICTIONS:
        raise CheckpointError(f"{path}: prediction_type={said!r}; allowed: {', '.join(_PREDICTIONS)}")
    return _PREDICTIONS[said]
