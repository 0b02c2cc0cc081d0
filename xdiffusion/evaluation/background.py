"""Background: how bright the pixels are that are never part of a digit. The first thing an inverting adapter flips."""

from __future__ import annotations

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

SHARE = 0.99


def background_mask(images: UInt8[Tensor, "N C H W"]) -> Bool[Tensor, "C H W"]:
    """The pixels that are dark (below half) in at least 99% of the images."""
    return sum((block < 128).sum(dim=0) for block in images.split(1024)) / len(images) >= SHARE


def background_brightness(images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "C H W"]) -> Float[Tensor, " B"]:
    """Mean over the masked pixels of each image in [-1, 1], as brightness in [0, 1]."""
    return images[:, mask].add(1).div(2).mean(1)
