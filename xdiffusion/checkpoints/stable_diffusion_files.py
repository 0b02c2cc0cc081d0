"""Stable Diffusion's files as others write them, read under our names: which model it is, and its tensors, still unread.

    original    one file, .safetensors or .ckpt, with the names of `stable_diffusion`
    diffusers   a folder with unet/, vae/ and text_encoder/, each one file or several with an index

The shapes tell the architecture. What they do not tell, above all whether a model predicts eps or v and on which schedule, a
folder says in its settings, and an original file in its header and in two empty tensors, `v_pred` and `ztsnr`, as models of
XL carry them. What a file says is laid over the built-in config of its shapes. A file of 2.x that does not say what it
predicts is taken by its name.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdiffusion.checkpoints.added_words import added_words
from xdiffusion.checkpoints.diffusers_folder import folder_tensors, read_settings
from xdiffusion.checkpoints.diffusers_settings import VOCABULARY, config_from
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.paths import is_pipeline_folder
from xdiffusion.checkpoints.stable_diffusion import (
    AUTOENCODER,
    AVERAGED,
    PIXELS_PER_LATENT,
    UNET,
    from_original,
    unused_in_original,
    with_text_projection,
)
from xdiffusion.checkpoints.weight_index import open_weights

MODELSPEC = "modelspec."  # of the keys of a file's header that describe a model, as Stability AI's ModelSpec names them
V_PRED, ZTSNR = "v_pred", "ztsnr"
_SIZES = {  # (width of the UNet's first level, width of the text embedding)
    (320, 768): "sd15",
    (320, 1024): "sd21",
    (16, 16): "sd15_tiny",
    (16, 24): "sd21_tiny",
}
_RELATIVES = {2048: "Stable Diffusion XL", 1280: "the refiner of Stable Diffusion XL"}  # by the width of their context
_UNCLIP = "the unCLIP of 2.1, which draws variations of a picture"
_INPUTS = {9: "for inpainting", 8: "InstructPix2Pix", 7: "an upscaler", 5: "for depth maps"}  # by the UNet's channels
_PREDICTIONS = {"epsilon": "eps", "v": "v", "v_prediction": "v"}
_NAMES_OF_V = {
    "sd15": re.compile(r"v[-_]?pred", re.IGNORECASE),
    "sd21": re.compile(r"768|v[-_]?pred|v-ema|[_-]v(?=[_-]|$)", re.IGNORECASE),
}
_ALONE = {  # a part's last layer, by the names of original files or of the libraries -> what a file is that holds no more
    "out.2.weight": "a UNet",
    "conv_out.weight": "a UNet",
    "decoder.conv_out.weight": "an autoencoder",
    f"{AUTOENCODER}decoder.conv_out.weight": "an autoencoder",
    "text_model.final_layer_norm.weight": "a text encoder",
    "final_layer_norm.weight": "a text encoder",
}
_TABLE = "text_encoder.token_embedding.weight"
_FIRST, _CONTEXT = "network.conv_in.weight", "network.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@dataclass(frozen=True)
class StableDiffusionFile:
    """What stands at a path.

    tensors: by our names, mapped.
    architecture: the built-in config of its shapes, by name.
    said: what the file says of that config, in its sections; above all the prediction and the schedule.
    guessed: the config's key that is taken by the file's name, since nothing in the file says it; "" if none is.
    unused: what an original file has, by our names, and no picture depends on: the last layer of 2.x's text encoder.
    words: that were added to a folder's vocabulary, (n, width) each; see `added_words`.
    notes: lines to print.
    """

    tensors: dict[str, Tensor]
    architecture: str
    said: Mapping[str, Any] = field(default_factory=dict)
    guessed: str = ""
    unused: Mapping[str, Tensor] = field(default_factory=dict)
    words: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_stable_diffusion(path: Path, ema: bool | None = None) -> StableDiffusionFile | None:
    """What stands at a path, if it is Stable Diffusion in one of the layouts above; None for anything else.

    Args:
        path: a file or a folder.
        ema: where the UNet's weights are there twice, take their moving average or not. None: of a file, which most programs
            read so, not, unless it is all there is; of a folder, which is named so, the average.

    Raises:
        CheckpointError: if it is damaged, another model of that family (XL, inpainting), or not there as `ema` asks for.
    """
    if is_pipeline_folder(path):
        return _read_folder(path, ema)
    stored, header = open_weights(path)
    averaged = not any(name.startswith(UNET) for name in stored)
    if averaged and not any(name.startswith(AVERAGED) for name in stored):
        return None
    if averaged and ema is False:
        raise CheckpointError(f"{path} holds nothing of its UNet but a moving average")
    try:
        tensors = with_text_projection(from_original(stored, ema or averaged))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if relative := _conditioned_otherwise(stored, tensors):
        raise CheckpointError(f"{path} is no Stable Diffusion 1.x or 2.x, but {relative}")
    found = recognise_original(path, tensors, stored.keys(), header, unused_in_original(stored))
    note = f"{path} is read: with the moving average of its UNet, since there is no other"
    return replace(found, notes=(*found.notes, note)) if averaged and ema is None else found


def part_alone(names: Iterable[str]) -> str | None:
    """What of Stable Diffusion a file with these names is, where it is one part in a file of its own."""
    return next((_ALONE[name] for name in names if name in _ALONE), None)


def recognise_original(
    path: Path,
    tensors: dict[str, Tensor],
    names: Container[str],
    header: Mapping[str, str],
    unused: Mapping[str, Tensor] | None = None,
) -> StableDiffusionFile:
    """Which model an original file is.

    Args:
        path: of the file, whose name may tell what it predicts.
        tensors: by our names.
        names: of all its tensors, in the file.
        header: of a safetensors file.
        unused: see `StableDiffusionFile`.

    Raises:
        CheckpointError: if it is another model.
    """
    size = _size(path, tensors)
    if size is None:
        raise _other_model(path, tensors)
    data, text, notes = {}, {"layers": _layers(tensors)}, []
    resolution = re.fullmatch(r"([1-9]\d{0,4})x\1", header.get(f"{MODELSPEC}resolution", ""))
    skip = re.fullmatch(r"[1-9]\d?", header.get(f"{MODELSPEC}encoder_layer", ""))
    if resolution and int(resolution[1]) % PIXELS_PER_LATENT:
        notes.append(f"resolution={resolution[0]}: its images' sides are multiples of {PIXELS_PER_LATENT}")
    elif resolution:
        data["image_size"] = int(resolution[1])
    if skip and size.startswith("sd15"):  # of 2.x some count from OpenCLIP's last layer, some from the last one used
        if int(skip[0]) <= text["layers"]:
            text["clip_skip"] = int(skip[0])
        else:
            notes.append(f"encoder_layer={skip[0]}: its text encoder has {text['layers']} layers")
    said = {
        "data": data,
        "model": {"text_encoder": text},
        "diffusion": {"schedule": {"zero_terminal_snr": True}} if ZTSNR in names else {},
    }
    found = StableDiffusionFile(
        tensors, size, said, unused=unused or {}, notes=tuple(f"{path}: ignored {MODELSPEC}{note}" for note in notes)
    )
    return _with_prediction(path, found, _prediction(names, header))


def _prediction(names: Container[str], header: Mapping[str, str]) -> str | None:
    """What an original file says that it predicts; None if nothing."""
    if V_PRED in names:
        return "v"
    for key in ("prediction_type", "predict_key"):  # ModelSpec's, and ComfyUI's
        if said := _PREDICTIONS.get(header.get(f"{MODELSPEC}{key}", "")):
            return said
    return "v" if header.get(f"{MODELSPEC}architecture", "").endswith("-768-v") else None


def header_of_original(config: Mapping[str, Any], title: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header, and the tensors without values, from which `recognise_original` reads a config's settings.

    Args:
        config: resolved.
        title: of the model.
    """
    text, diffusion, size = config["model"]["text_encoder"], config["diffusion"], config["data"]["image_size"]
    predicts_v, version_1 = diffusion["prediction"] == "v", text["activation"] == "quick_gelu"
    code = "CompVis/stable-diffusion" if version_1 else "Stability-AI/stablediffusion"
    described = {
        "sai_model_spec": "1.0.0",
        "architecture": f"stable-diffusion-v{1 if version_1 else '2-768-v' if predicts_v else '2-512'}",
        "implementation": f"https://github.com/{code}",
        "title": title,
        "resolution": f"{size}x{size}",
        "prediction_type": "v" if predicts_v else "epsilon",
    }
    if version_1:
        described["encoder_layer"] = str(text["clip_skip"])
    marks = {V_PRED: predicts_v, ZTSNR: diffusion["schedule"].get("zero_terminal_snr", False)}
    header = {"format": "pt", **{f"{MODELSPEC}{key}": value for key, value in described.items()}}
    return header, {name: torch.empty(0) for name, holds in marks.items() if holds}


def _read_folder(path: Path, ema: bool | None) -> StableDiffusionFile:
    tensors, notes = folder_tensors(path, ema)
    tensors = with_text_projection(tensors)
    size = _size(path, tensors)
    if (path / "text_encoder_2").is_dir() or (size is None and _relative(tensors)):
        raise _other_model(path, tensors)
    try:
        said = config_from(read_settings(path), _layers(tensors))
    except ValueError as error:
        raise CheckpointError(f"{path}/{error}") from error
    words = {}
    if (table := tensors.get(_TABLE)) is not None and table.ndim == 2:
        words, tensors[_TABLE] = added_words(path / "tokenizer", table), table[:VOCABULARY]
    # of other sizes than the built-in ones too
    found = StableDiffusionFile(tensors, size or "sd15", said, words=words, notes=notes)
    return _with_prediction(path, found, said["diffusion"].get("prediction"))


def _with_prediction(path: Path, found: StableDiffusionFile, prediction: str | None) -> StableDiffusionFile:
    """The file with the name of its built-in config, which for 2.x follows from the prediction, and for all overrides it."""
    family, _, tiny = found.architecture.partition("_")
    named_v, guessed = _NAMES_OF_V[family].search(path.stem), ""
    if prediction is None and (named_v or family == "sd21"):
        prediction, guessed = "v" if named_v else "eps", "diffusion.prediction"
    architecture = f"sd21_{'v' if prediction == 'v' else 'base'}" if family == "sd21" else family
    diffusion = found.said["diffusion"] | ({"prediction": prediction} if prediction else {})
    return replace(
        found,
        architecture=f"{architecture}_{tiny}" if tiny else architecture,
        said={**found.said, "diffusion": diffusion},
        guessed=guessed,
    )


def _size(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """Which of the sizes above the tensors have."""
    shapes = [tuple(tensors[name].shape) for name in (_FIRST, _CONTEXT) if name in tensors]
    if [len(shape) for shape in shapes] != [4, 2][: len(shapes)]:
        raise CheckpointError(f"{path} is damaged: the first layers of its UNet have the shapes {shapes}")
    widths = (shapes[0][0], shapes[1][1]) if len(shapes) == 2 else None
    return _SIZES.get(widths) if widths and shapes[0][1] == 4 else None


def _layers(tensors: Mapping[str, Tensor]) -> int:
    """Of the text encoder."""
    return len({name.split(".")[2] for name in tensors if name.startswith("text_encoder.layers.")})


def _conditioned_otherwise(stored: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """What a model is that is conditioned on more than a text, by the names in its file and by ours; "" for others."""
    if any(name.startswith("conditioner.embedders.1.") for name in stored):
        return _RELATIVES[2048]
    if any(name.startswith((f"{UNET}label_emb", f"{AVERAGED}label_emb")) for name in stored):
        return _UNCLIP if _CONTEXT in tensors else _RELATIVES[2048]  # whose first level has no attention
    return ""


def _relative(tensors: Mapping[str, Tensor]) -> str:
    """What a model that is neither 1.x nor 2.x may be."""
    channels = tensors[_FIRST].shape[1] if _FIRST in tensors else 4
    width = tensors[_CONTEXT].shape[1] if _CONTEXT in tensors else 0
    return _RELATIVES.get(width) or _INPUTS.get(channels, "")


def _other_model(path: Path, tensors: Mapping[str, Tensor]) -> CheckpointError:
    missing = next((name for name in (_FIRST, _CONTEXT) if name not in tensors), None)
    relative = _relative(tensors)
    what = f"{path} is no Stable Diffusion 1.x or 2.x{f', but {relative}' if relative else ''}: its UNet has "
    if missing:
        return CheckpointError(f"{what}no {missing}")
    (width, channels, *_), text_width = tensors[_FIRST].shape, tensors[_CONTEXT].shape[1]
    known = ", ".join(f"{w}/{t}" for w, t in _SIZES)
    return CheckpointError(
        f"{what}first width {width}, text width {text_width} and {channels} input channels; known are {known} with 4"
    )
