"""The names of the UNet's weights in the diffusers library, and in ours. Pure dict -> dict, both ways.

Ours are diffusers' names without the list indices of one-element lists; the pairs below are all that differs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_UNET_PAIRS = (  # (diffusers, ours)
    (".to_out.0.", ".to_out."),
    (".ff.net.0.proj.", ".ff.proj_in."),
    (".ff.net.2.", ".ff.proj_out."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
)


def unet_name_from_diffusers(name: str) -> str:
    """down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight -> ....to_out.weight."""
    for theirs, ours in _UNET_PAIRS:
        name = name.replace(theirs, ours)
    return name


def unet_name_to_diffusers(name: str) -> str:
    """The inverse of `unet_name_from_diffusers`."""
    for theirs, ours in _UNET_PAIRS:
        name = name.replace(ours, theirs)
    return name


def unet_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet2DConditionModel's state dict under our names."""
    return {unet_name_from_diffusers(name): tensor for name, tensor in tensors.items()}


def unet_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unet_from_diffusers`."""
    return {unet_name_to_diffusers(name): tensor for name, tensor in tensors.items()}
