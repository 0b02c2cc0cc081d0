"""A collection of captioned pictures of any sizes, decoded when a step needs them, in aspect-ratio buckets."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from xdiffusion.data.buckets import Size, bucket_sizes, nearest_bucket
from xdiffusion.data.captions import PromptTable, fault_in, preview_table
from xdiffusion.data.image_files import DamagedImage, Picture, check_enlargement
from xdiffusion.data.image_set import Batch, to_unit_range

LONGEST_NAME = 80  # letters that a message shows
NAMED = 5  # skipped pictures that a summary names; the others are counted


@dataclass(frozen=True)
class Crop:
    """How a picture is cut to its bucket. flip: mirrored. top, left: see `buckets.crop`."""

    flip: bool = False
    top: float = 0.5
    left: float = 0.5


class CaptionedImages:
    """The usable pictures of a collection: by their headers, and for each shape one that was seen to be whole.

    Args:
        name: as in `--dataset_name`.
        pictures: all that were found; the unusable ones are skipped, counted and named in `summary`.
        captions_from: where the captions come from, for the summary.
        image_size, bucket_multiple, max_aspect: see `bucket_sizes`.
        random_crop: crop somewhere, not at the centre.
        flip: mirror every other picture at random.
        captions: if given, the captions of every picture instead of its own; one is drawn each time.
        absent: pictures that a list names and that are not there, beside those of `pictures`.

    Attributes:
        damaged: the indices of pictures that proved damaged since, which others replace.

    Raises:
        ValueError: if no picture is left, or the sizes do not go together.
    """

    channels = 3

    def __init__(
        self,
        name: str,
        pictures: Sequence[Picture],
        captions_from: str,
        *,
        image_size: int,
        bucket_multiple: int = 64,
        max_aspect: float = 2.0,
        random_crop: bool = False,
        flip: bool = False,
        captions: Sequence[str] | None = None,
        absent: int = 0,
    ):
        self.name = name
        self.image_size = image_size
        self.random_crop = random_crop
        self.flip = flip
        self.pictures: list[Picture] = []
        self.sizes: list[Size] = []
        self.captions: list[tuple[str, ...]] = []
        self.skipped: dict[str, str] = {}
        self.absent = absent
        self.damaged: set[int] = set()
        sizes, whole = bucket_sizes(image_size, bucket_multiple, max_aspect), set()
        for picture in pictures:
            try:
                size = _usable_size(picture, sizes, needs_caption=not captions)
                if size not in whole:  # a shape of which none is whole is left out, of the others one can stand in
                    picture.pixels()
                    whole.add(size)
            except DamagedImage as error:
                self.skipped[picture.name] = str(error)
                continue
            self.pictures.append(picture)
            self.sizes.append(size)
            self.captions.append(tuple(captions) if captions else (picture.caption,))
        self.captions_from = "the config" if captions else captions_from
        if not self.pictures:
            raise ValueError(f"no usable picture: {self.summary}")

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def buckets(self) -> dict[Size, Int[Tensor, " n"]]:
        """The indices of the pictures of each shape."""
        members = defaultdict(list)
        for index, size in enumerate(self.sizes):
            members[size].append(index)
        return {size: torch.tensor(members[size]) for size in sorted(members)}

    @property
    def prompts(self) -> PromptTable:
        """The first few different captions, for previews."""
        return preview_table(caption for captions in self.captions for caption in captions)

    @property
    def summary(self) -> str:
        """One line: how many pictures, their shapes, where the captions come from, and what was skipped."""
        shapes = ", ".join(f"{w}x{h}: {len(index)}" for (h, w), index in self.buckets.items())
        line = f"{self.name}: {_counted(len(self), 'picture')} in {_counted(len(self.buckets), 'shape')}"
        line += f" ({shapes}), captions from {self.captions_from}" if shapes else ""
        if not self.skipped:
            return line
        named = [f"{_shortened(name)} ({reason})" for name, reason in list(self.skipped.items())[:NAMED]]
        count = len(self.skipped) + self.absent
        more = [f"and {count - NAMED} more"] if count > NAMED else []
        return f"{line}; skipped {count}: {', '.join(named + more)}"

    def batch(
        self,
        index: Int[Tensor, " B"],
        wording: Float[Tensor, " B"],
        moves: Float[Tensor, "3 B"],
        size: Size | None = None,
    ) -> Batch:
        """The indexed pictures, which are of one bucket; a label is a picture's index.

        Args:
            index: of the pictures. One that proves damaged is replaced, see `load`.
            wording: in [0, 1), picks the caption.
            moves: in [0, 1): flip, top and left.
            size: (height, width), where it is not the bucket's.
        """
        loaded = [self.load(i, crop, size) for i, crop in zip(index.tolist(), self.crops(moves))]
        labels = [i for i, _ in loaded]
        images = to_unit_range(torch.stack([image for _, image in loaded]))
        return Batch(images, torch.tensor(labels), self.captions_of(labels, wording))

    def crops(self, moves: Float[Tensor, "3 B"]) -> list[Crop]:
        """What the draws mean under this collection's settings."""
        flips, tops, lefts = moves.tolist()
        return [
            Crop(self.flip and f < 0.5, *((top, left) if self.random_crop else (0.5, 0.5)))
            for f, top, left in zip(flips, tops, lefts)
        ]

    def captions_of(self, index: Sequence[int], wording: Float[Tensor, " B"]) -> list[str]:
        """One caption for each indexed picture."""
        tables = [self.captions[i] for i in index]
        return [captions[int(u * len(captions))] for captions, u in zip(tables, wording.tolist())]

    def load(self, index: int, crop: Crop, size: Size | None = None) -> tuple[int, UInt8[Tensor, "3 H W"]]:
        """A picture's pixels, and its index; where it proves damaged, those of the next whole one of its bucket, and if
        there is none any more, of the others.

        Raises:
            ValueError: if none of all is whole.
        """
        damaged: dict[int, DamagedImage] = {}
        for candidate in self._standing_for(index):
            try:
                image = self.pictures[candidate].pixels(size or self.sizes[index], crop.top, crop.left)
            except DamagedImage as error:
                damaged[candidate] = error
                continue
            self._report(damaged, candidate)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            return candidate, pixels.flip(2) if crop.flip else pixels
        raise ValueError(
            f"{self.name}: none of its {len(self)} pictures is whole any more: "
            f"{_shortened(self.pictures[index].name)} {damaged[index]}"
        )

    def _standing_for(self, index: int) -> Iterator[int]:
        """A picture, those that follow in its bucket, and all others: the same on each call."""
        yield index
        members = self.buckets[self.sizes[index]]  # maybe a million: listed only where the picture is damaged
        yield from members.roll(-int(torch.searchsorted(members, index)))[1:].tolist()
        yield from (i for i, size in enumerate(self.sizes) if size != self.sizes[index])

    def _report(self, damaged: Mapping[int, DamagedImage], instead: int) -> None:
        for index, error in damaged.items():
            if index not in self.damaged:
                self.damaged.add(index)
                names = (_shortened(self.pictures[i].name) for i in (index, instead))
                print(
                    f"warning: {' is replaced by '.join(names)}: {error}; {len(self.damaged)} damaged so far",
                    file=sys.stderr,
                )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _shortened(name: str) -> str:
    """A name that a list gave, of any length."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def _usable_size(picture: Picture, sizes: Sequence[Size], needs_caption: bool) -> Size:
    """The bucket of a picture.

    Raises:
        DamagedImage: if it cannot be used.
    """
    if needs_caption and not (picture.caption or "").strip():
        raise DamagedImage(picture.uncaptioned)
    if needs_caption and (fault := fault_in(picture.caption)):
        raise DamagedImage(fault)
    width, height = picture.size()
    size = nearest_bucket(width, height, sizes)
    check_enlargement(width, height, size)
    return size
