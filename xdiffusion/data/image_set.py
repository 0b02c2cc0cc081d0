"""A labelled image set held in memory, its batches, and its inverted style.

Small sets live as one uint8 tensor, resized once: a batch is an index and a scaling, with no per-image work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from xdiffusion.data.captions import PromptTable

MAX_BYTES = 4 * 2**30  # of a set that is held in memory
BLOCK_PIXELS = 2**22  # of the images that are floats at a time while a set is made


class Batch(NamedTuple):
    """images: (B, C, H, W) float32 in [-1, 1]; labels: (B,) int64; captions: B strings."""

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    captions: list[str]


@dataclass(frozen=True)
class Split:
    """images: (N, C, H, W) uint8, 0 = black; labels: (N,) int64; variants: how many images in turn are of one source.

    Image i is of source i modulo N / variants: only the sources are independent of each other.
    """

    images: UInt8[Tensor, "N C H W"]
    labels: Int[Tensor, " N"]
    variants: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def groups(self) -> Int[Tensor, " N"]:
        """The source of each image."""
        return torch.arange(len(self)) % (len(self) // self.variants)

    def floats(self, index: Int[Tensor, " B"] | slice = slice(None)) -> Float[Tensor, "B C H W"]:
        """The indexed images scaled to [-1, 1]."""
        return to_unit_range(self.images[index])


@dataclass(frozen=True)
class ImageSet:
    """A training and a held-out split, with the captions of the classes.

    Args:
        name: as in `--dataset_name`.
        train, test: the splits; the test split is never trained on.
        prompts: the captions of each class.
        inverted: whether the images are negatives of the named set's; evaluation un-inverts them for the judge.
    """

    name: str
    train: Split
    test: Split
    prompts: PromptTable
    inverted: bool = False

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def batch(self, index: Int[Tensor, " B"], wording: Float[Tensor, " B"]) -> Batch:
        """The indexed training images; `wording` in [0, 1) picks each caption among its class's."""
        labels = self.train.labels[index]
        return Batch(self.train.floats(index), labels, self.prompts.choose(labels, wording))


def check_fits(name: str, count: int, channels: int, image_size: int) -> None:
    """Raise ValueError for a set that would take more than MAX_BYTES, before it is made: a stranger's file may say its size."""
    taken = count * channels * image_size**2
    if taken > MAX_BYTES:
        raise ValueError(
            f"image_size={image_size}: {count:,} images of {name} take {taken:,} bytes in memory; allowed are {MAX_BYTES:,}"
        )


def in_blocks(images: Tensor, image_size: int) -> Sequence[Tensor]:
    """Images, or what is as long, in blocks of BLOCK_PIXELS at image_size."""
    return images.split(max(1, BLOCK_PIXELS // image_size**2))


def invert(images: ImageSet) -> ImageSet:
    """The negative of every image under the same captions, the style that the lessons teach a LoRA; its own inverse."""

    def negative(split: Split) -> Split:
        return replace(split, images=255 - split.images)

    return replace(
        images,
        name=images.name.removesuffix("_inverted") if images.inverted else f"{images.name}_inverted",
        train=negative(images.train),
        test=negative(images.test),
        inverted=not images.inverted,
    )


def to_unit_range(images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """0..255 -> [-1, 1]."""
    return images.float().mul_(2 / 255).sub_(1)


def to_uint8(images: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
    """[-1, 1] -> 0..255, rounded and clamped; the inverse of `to_unit_range` on its values."""
    return images.add(1).mul_(255 / 2).round_().clamp_(0, 255).to(torch.uint8)
