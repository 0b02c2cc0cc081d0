"""A latent diffusion model as a folder of the diffusers library, which its pipelines open without a network: read and written.

model_index.json, scheduler/, text_encoder/, tokenizer/, unet/, vae/; each part's weights are one file, or several and an index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.diffusers import (
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    below,
    text_encoder_from_transformers,
    text_encoder_to_transformers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from xdiffusion.checkpoints.diffusers_settings import FILES, SPECIAL_TOKENS, VERSION, folder_settings
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.paths import SAFETENSORS
from xdiffusion.checkpoints.reading import read_json
from xdiffusion.checkpoints.weight_index import open_weights, read_indexed
from xdiffusion.checkpoints.writing import new_folder, save_safetensors

_PARTS = {  # folder: (our part, from its names, to its names, name of its weights)
    "unet": ("network", unet_from_diffusers, unet_to_diffusers, "diffusion_pytorch_model"),
    "vae": ("autoencoder", autoencoder_from_diffusers, autoencoder_to_diffusers, "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", text_encoder_from_transformers, text_encoder_to_transformers, "model"),
}
_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
_PLAIN = (  # in full precision before half, safetensors before pickled
    "{}.safetensors", "{}.safetensors.index.json", "{}.fp16.safetensors", "{}.safetensors.index.fp16.json",
    "{}.bin", "{}.bin.index.json", "{}.fp16.bin", "{}.bin.index.fp16.json",
)  # fmt: skip
# beside a UNet's moving average, which has the plain name, its weights as they were
_NOT_AVERAGED = (
    "{}.non_ema.safetensors", "{}.safetensors.index.non_ema.json", "{}.non_ema.bin", "{}.bin.index.non_ema.json",
)  # fmt: skip


def folder_tensors(folder: Path, ema: bool | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a pipeline's folder by our names, mapped, and a line for each file that was not the first choice.

    Args:
        folder: of the pipeline.
        ema: of a UNet that is there twice, take the moving average or not; None: the average, else what there is.

    Raises:
        CheckpointError: if weights are missing or damaged, or not there in the kind that `ema` asks for.
    """
    tensors: dict[str, Tensor] = {}
    notes = ()
    for component, (part, from_theirs, _, _) in _PARTS.items():
        path = weight_file(folder / component, ema if component == "unet" else None)
        if ".non_ema." in path.name and ema is None:
            notes = (f"{path} is read: without a moving average, since there is no other",)
        stored = read_indexed(path) if path.suffix == ".json" else open_weights(path)[0]
        tensors |= {f"{part}.{name}": tensor for name, tensor in from_theirs(stored).items()}
    return tensors, notes


def weight_file(folder: Path, ema: bool | None = None) -> Path:
    """The weights of a component's folder, or their index; of several the first in a fixed order.

    Args:
        folder: of the component.
        ema: see `folder_tensors`.

    Raises:
        CheckpointError: if there are none, or none of the kind that `ema` asks for.
    """

    def named(kinds: Sequence[str]) -> list[Path]:
        return [folder / kind.format(name) for kind in kinds for name in _WEIGHTS]

    averaged, others = named(_PLAIN), named(_NOT_AVERAGED)
    if ema and not any(path.is_file() for path in others):
        raise CheckpointError(f"{folder} holds its weights once, and does not say that they are a moving average")
    candidates = {None: [*averaged, *others], True: averaged, False: others}[ema]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        present = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
        kind = {
            None: "no weights",
            True: "no moving average",
            False: "no weights that are known to be no moving average",
        }
        looked = ", ".join(path.name for path in candidates)
        raise CheckpointError(f"{folder} holds {kind[ema]}: looked for {looked}; there is {present}")
    return found


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings that are there, by path, see `diffusers_settings`.

    Raises:
        CheckpointError: if one cannot be read.
    """
    return {name: _read_mapping(folder / name) for name in (*FILES, SPECIAL_TOKENS) if (folder / name).is_file()}


def _read_mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no settings but {content!r:.40}")
    return content


def write_diffusers_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    merges: Sequence[str],
) -> None:
    """Write a model as a pipeline's folder, whole or not at all.

    Args:
        folder: must not be there yet.
        tensors: by our names.
        config: resolved, of that model.
        vocabulary, merges: of the tokenizer: id by token, and "a b" in order.

    Raises:
        CheckpointError: if the folder is there or cannot be written.
    """
    with new_folder(folder) as copy:
        for component, (part, _, to_theirs, name) in _PARTS.items():
            weights = to_theirs(below(tensors, f"{part}."))
            save_safetensors(copy / component / f"{name}{SAFETENSORS}", weights, {"format": "pt"})
        for path, settings in (folder_settings(config) | {"model_index.json": _MODEL_INDEX}).items():
            _write_json(copy / path, settings)
        _write_json(copy / "tokenizer" / "vocab.json", vocabulary)
        (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
