"""The names of Stable Diffusion's original single files ([LDM]'s code), and ours. Pure dict -> dict, both ways.

    model.diffusion_model.*               network.*         input_blocks, middle_block, output_blocks
    first_stage_model.*                   autoencoder.*
    cond_stage_model.transformer.*        text_encoder.*    1.x: OpenAI's CLIP with transformers' names
    cond_stage_model.model.*                                2.x: OpenCLIP, whose 24th layer no picture depends on
    conditioner.embedders.0.*             as cond_stage_model.*: SD-Turbo, which is a 2.1
    model_ema.diffusion_model*            the UNet's moving average, with names without dots

All files of this layout have two residual blocks per level, no attention at the UNet's last level, and an autoencoder of
four levels, so a name's place follows from the name alone. Everything else in a file (schedules, the discriminator and
the moving average of the autoencoder's training) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from xdiffusion.checkpoints.diffusers import (
    below,
    text_encoder_from_transformers,
    text_encoder_to_transformers,
    unet_name_from_diffusers,
    unet_name_to_diffusers,
)
from xdiffusion.checkpoints.open_clip import text_encoder_from_open_clip, text_encoder_to_open_clip

TextNames = Literal["transformers", "open_clip"]
UNET, AUTOENCODER, AVERAGED = "model.diffusion_model.", "first_stage_model.", "model_ema.diffusion_model"
TEXT_TRANSFORMERS, TEXT_OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_TEXT_OF_TURBO = "conditioner.embedders.0."
_LEVELS, _RES_BLOCKS = 4, 2
PIXELS_PER_LATENT = 2 ** (_LEVELS - 1)
_UNUSED_LAYER = "layers.23."


def from_original(tensors: Mapping[str, Tensor], ema: bool = False) -> dict[str, Tensor]:
    """An original file's tensors under the names of `DiffusionModel`; views, no copies.

    Args:
        tensors: a whole file, or any of its components.
        ema: take the UNet's moving average in place of its weights.

    Raises:
        ValueError: if `ema` and the average is not that of the UNet which the file holds.
    """
    tensors = _with_usual_text_names(tensors)
    parts = {prefix: below(tensors, prefix) for prefix in (UNET, AUTOENCODER, TEXT_TRANSFORMERS, TEXT_OPEN_CLIP)}
    if ema:
        parts[UNET] = _moving_average(tensors, parts[UNET])
    text = text_encoder_from_open_clip(parts[TEXT_OPEN_CLIP])
    text |= text_encoder_from_transformers(parts[TEXT_TRANSFORMERS])
    ours = {f"network.{unet_name_from_original(name)}": tensor for name, tensor in parts[UNET].items()}
    for name, tensor in parts[AUTOENCODER].items():
        if not name.startswith(("loss.", "model_ema.")):
            ours[f"autoencoder.{_swap(name, _FROM_AUTOENCODER)}"] = _as_linear(name, tensor)
    ours |= {f"text_encoder.{name}": t for name, t in text.items() if not name.startswith(_UNUSED_LAYER)}
    return ours


def unused_in_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last layer of 2.x's text encoder, which `from_original` leaves out, under our names: `to_original` takes it back."""
    return {
        f"text_encoder.{name}": tensor
        for name, tensor in text_encoder_from_open_clip(below(_with_usual_text_names(tensors), TEXT_OPEN_CLIP)).items()
        if name.startswith(_UNUSED_LAYER)
    }


def _with_usual_text_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    usual = {f"{_TEXT_OF_TURBO}{name}": f"cond_stage_model.{name}" for name in below(tensors, _TEXT_OF_TURBO)}
    return {usual.get(name, name): tensor for name, tensor in tensors.items()}


def to_original(tensors: Mapping[str, Tensor], text_names: TextNames) -> dict[str, Tensor]:
    """The inverse of `from_original`: "transformers" text names for 1.x, "open_clip" for 2.x."""
    theirs = {f"{UNET}{unet_name_to_original(n)}": tensor for n, tensor in below(tensors, "network.").items()}
    for name, tensor in below(tensors, "autoencoder.").items():
        name = _swap(name, _TO_AUTOENCODER)
        theirs[f"{AUTOENCODER}{name}"] = tensor[:, :, None, None] if _is_projection(name) else tensor
    text = below(tensors, "text_encoder.")
    if text_names == "open_clip":
        named, prefix = text_encoder_to_open_clip(text), TEXT_OPEN_CLIP
    else:
        named, prefix = text_encoder_to_transformers(text), TEXT_TRANSFORMERS
    return theirs | {f"{prefix}{name}": tensor for name, tensor in named.items()}


def with_text_projection(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names, with the identity for a text_projection that the file does not have.

    Images do not depend on it: it maps to the space that CLIP shares with images.
    """
    name = "text_encoder.text_projection.weight"
    positions = tensors.get("text_encoder.positional_embedding")
    if name in tensors or positions is None:
        return tensors
    return tensors | {name: torch.eye(positions.shape[1], dtype=positions.dtype, device=positions.device)}


def unet_name_from_original(name: str) -> str:
    """input_blocks.1.0.in_layers.0.weight -> down_blocks.0.resnets.0.norm1.weight."""
    return unet_name_from_diffusers(_swap(name, _FROM_UNET))


def unet_name_to_original(name: str) -> str:
    """The inverse of `unet_name_from_original`."""
    swapped = _swap(name, _TO_UNET)
    # inside a transformer the original names are diffusers'; the pairs of the changes of resolution cannot occur there
    return unet_name_to_diffusers(swapped) if ".transformer_blocks." in name else swapped


def _unet_places() -> Iterator[tuple[str, str]]:
    """(original, ours) beginnings of the UNet's names."""
    yield "time_embed.0.", "time_embedding.linear_1."
    yield "time_embed.2.", "time_embedding.linear_2."
    yield "input_blocks.0.0.", "conv_in."
    yield "out.0.", "conv_norm_out."
    yield "out.2.", "conv_out."
    yield from _resnet("middle_block.0.", "mid_block.resnets.0.")
    yield "middle_block.1.", "mid_block.attentions.0."
    yield from _resnet("middle_block.2.", "mid_block.resnets.1.")
    for level in range(_LEVELS):
        first = 1 + level * (_RES_BLOCKS + 1)
        for i in range(_RES_BLOCKS):
            yield from _resnet(f"input_blocks.{first + i}.0.", f"down_blocks.{level}.resnets.{i}.")
            yield f"input_blocks.{first + i}.1.", f"down_blocks.{level}.attentions.{i}."
        yield f"input_blocks.{first + _RES_BLOCKS}.0.op.", f"down_blocks.{level}.downsample.conv."
        first = level * (_RES_BLOCKS + 1)
        for i in range(_RES_BLOCKS + 1):
            yield from _resnet(f"output_blocks.{first + i}.0.", f"up_blocks.{level}.resnets.{i}.")
            yield f"output_blocks.{first + i}.1.", f"up_blocks.{level}.attentions.{i}."
        behind = 2 if level else 1  # the first level on the way up has no attention before its upsampling
        yield f"output_blocks.{first + _RES_BLOCKS}.{behind}.conv.", f"up_blocks.{level}.upsample.conv."


def _averaged_names() -> Iterator[tuple[str, str]]:
    """(name in a moving average, original name): out2weight is the average of out.2.weight."""
    attentions = (f"attn{i}.to_{projection}." for i in (1, 2) for projection in ("q", "k", "v", "out.0"))
    block = [f"transformer_blocks.0.{layer}" for layer in (*attentions, "ff.net.0.proj.", "ff.net.2.")]
    block += [f"transformer_blocks.0.norm{i}." for i in (1, 2, 3)]
    for theirs, ours in _UNET_PLACES:
        for layer in ("norm.", "proj_in.", "proj_out.", *block) if ".attentions." in ours else ("",):
            for kind in ("weight", "bias"):
                name = f"{theirs}{layer}{kind}"
                yield name.replace(".", ""), name


def _resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}in_layers.0.", f"{ours}norm1."
    yield f"{theirs}in_layers.2.", f"{ours}conv1."
    yield f"{theirs}emb_layers.1.", f"{ours}time_emb_proj."
    yield f"{theirs}out_layers.0.", f"{ours}norm2."
    yield f"{theirs}out_layers.3.", f"{ours}conv2."
    yield f"{theirs}skip_connection.", f"{ours}conv_shortcut."


def _autoencoder_places() -> Iterator[tuple[str, str]]:
    """(original, ours) beginnings of the autoencoder's names, where they differ."""
    for part in ("encoder", "decoder"):
        yield f"{part}.norm_out.", f"{part}.conv_norm_out."
        yield f"{part}.mid.block_1.", f"{part}.mid_block.resnets.0."
        yield f"{part}.mid.block_2.", f"{part}.mid_block.resnets.1."
        for theirs, ours in (
            ("norm", "group_norm"),
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("proj_out", "to_out"),
        ):
            yield f"{part}.mid.attn_1.{theirs}.", f"{part}.mid_block.attentions.0.{ours}."
    for level in range(_LEVELS):
        up = _LEVELS - 1 - level  # the original counts the decoder's levels by resolution, not by order
        for i in range(_RES_BLOCKS + 1):
            for theirs, ours in (
                (f"encoder.down.{level}", "encoder.down_blocks"),
                (f"decoder.up.{up}", "decoder.up_blocks"),
            ):
                block = f"{ours}.{level}.resnets.{i}."
                yield f"{theirs}.block.{i}.nin_shortcut.", f"{block}conv_shortcut."
                yield f"{theirs}.block.{i}.", block
        yield f"encoder.down.{level}.downsample.", f"encoder.down_blocks.{level}.downsample."
        yield f"decoder.up.{up}.upsample.", f"decoder.up_blocks.{level}.upsample."


def _kept_attention() -> Iterator[tuple[str, str]]:
    """The autoencoder's attention where diffusers' script of 2023 left its own names; only read."""
    for part in ("encoder", "decoder"):
        for theirs, ours in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out")):
            yield f"{part}.mid.attn_1.{theirs}.", f"{part}.mid_block.attentions.0.{ours}."


def _longest_first(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(pairs, key=lambda pair: -len(pair[0]))


_UNET_PLACES, _AUTOENCODER_PLACES = list(_unet_places()), list(_autoencoder_places())
_FROM_AVERAGE = dict(_averaged_names())
_FROM_UNET = _longest_first(_UNET_PLACES)
_TO_UNET = _longest_first([(ours, theirs) for theirs, ours in _UNET_PLACES])
_FROM_AUTOENCODER = _longest_first([*_AUTOENCODER_PLACES, *_kept_attention()])
_TO_AUTOENCODER = _longest_first([(ours, theirs) for theirs, ours in _AUTOENCODER_PLACES])


def _swap(name: str, pairs: list[tuple[str, str]]) -> str:
    """The name with its longest beginning that the table knows exchanged."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _moving_average(tensors: Mapping[str, Tensor], unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The average by the UNet's names; `unet`, if it is there too, must have the same ones."""
    found = {_FROM_AVERAGE.get(name, name): tensor for name, tensor in below(tensors, AVERAGED).items()}
    if unet and found.keys() != unet.keys():
        both = len(found.keys() & unet.keys())
        raise ValueError(f"the file holds the moving average of {both} of the UNet's {len(unet)} tensors")
    return found


def _is_projection(name: str) -> bool:
    """Whether it is a weight of the original autoencoder's attention that is a 1x1 convolution there."""
    return ".mid.attn_1." in name and name.endswith(".weight") and ".norm." not in name


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """As our layers have it: weights without their 1x1, and biases, to which diffusers' script of 12/2023 gave one."""
    if _is_projection(name):
        return tensor.flatten(1)
    return tensor.flatten() if ".mid.attn_1." in name else tensor
