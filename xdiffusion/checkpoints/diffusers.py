"""The names of Stable Diffusion's parts in the diffusers and transformers libraries, and in ours. Pure dict -> dict.

Our UNet and autoencoder have diffusers' names without the list indices of one-element lists; the pairs below are all
that differs. The text encoder's names are its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_PAIRS = (  # (diffusers, ours), of the UNet and of the autoencoder
    (".to_out.0.", ".to_out."),
    (".ff.net.0.proj.", ".ff.proj_in."),
    (".ff.net.2.", ".ff.proj_out."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
)
_OLD_ATTENTION_PAIRS = (  # (diffusers before 0.17, ours), of the autoencoder; only read
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out."),
)
_TEXT = {  # transformers -> ours
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "final_norm.weight",
    "final_layer_norm.bias": "final_norm.bias",
}
_TEXT_LAYER = {
    "self_attn.q_proj": "attn.to_q",
    "self_attn.k_proj": "attn.to_k",
    "self_attn.v_proj": "attn.to_v",
    "self_attn.out_proj": "attn.to_out",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unet_name_from_diffusers(name: str) -> str:
    """down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight -> ....to_out.weight."""
    for theirs, ours in _PAIRS:
        name = name.replace(theirs, ours)
    return name


def unet_name_to_diffusers(name: str) -> str:
    """The inverse of `unet_name_from_diffusers`."""
    for theirs, ours in _PAIRS:
        name = name.replace(ours, theirs)
    return name


def unet_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet2DConditionModel's state dict under our names."""
    return {unet_name_from_diffusers(name): tensor for name, tensor in tensors.items()}


def unet_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unet_from_diffusers`."""
    return {unet_name_to_diffusers(name): tensor for name, tensor in tensors.items()}


def autoencoder_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL's state dict, of any age, under the names of `KLAutoencoder`."""
    ours = {}
    for name, tensor in tensors.items():
        for old, new in _OLD_ATTENTION_PAIRS:
            name = name.replace(old, new)
        once_convolution = ".attentions." in name and tensor.ndim == 4  # of 1x1
        ours[unet_name_from_diffusers(name)] = tensor.flatten(1) if once_convolution else tensor
    return ours


def autoencoder_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `autoencoder_from_diffusers`, with today's names."""
    return unet_to_diffusers(tensors)


def text_encoder_from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModel's state dict under the names of `CLIPTextEncoder`, without text_projection, which it has not.

    Names begin with `text_model.`, or, since transformers 5, do not. `position_ids` of old files are left out.
    """
    ours = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer and layer[2] in _TEXT_LAYER:
            ours[f"layers.{layer[1]}.{_TEXT_LAYER[layer[2]]}.{layer[3]}"] = tensor
        elif name != "embeddings.position_ids":
            ours[_TEXT.get(name, name)] = tensor
    return ours


def text_encoder_to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `text_encoder_from_transformers`, with `text_model.` in front; text_projection is left out."""
    plain = {ours: theirs for theirs, ours in _TEXT.items()}
    in_layer = {ours: theirs for theirs, ours in _TEXT_LAYER.items()}
    theirs = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer:
            name = f"encoder.layers.{layer[1]}.{in_layer[layer[2]]}.{layer[3]}"
        if layer or name in plain:
            theirs[f"text_model.{plain.get(name, name)}"] = tensor
    return theirs
