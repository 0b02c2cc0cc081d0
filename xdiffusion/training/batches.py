"""What each step trains on: pictures or their cached latents, captions, and weights.

Every draw (which pictures, which captions are dropped, crops, flips, where in its posterior a latent lies) is made for
the whole batch from the seed and the step, and a part takes its rows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.data.image_set import ImageSet
from xdiffusion.data.shards import Shards
from xdiffusion.training.bucket_order import BucketOrder
from xdiffusion.training.latent_cache import LatentCache
from xdiffusion.training.randomness import Consecutive, DataOrder, generator_at
from xdiffusion.training.reading_ahead import ReadAhead
from xdiffusion.training.settings import TrainingSettings

Data = ImageSet | CaptionedImages | Shards
Posterior = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Rows(NamedTuple):
    """What one source gives to a part: pictures, or the mean and deviation of their latents; `own`: which rows of the batch."""

    own: Int[Tensor, " b"]
    captions: list[str]
    images: Float[Tensor, "b C H W"] | None
    mean: Float[Tensor, "b C h w"] | None = None
    std: Float[Tensor, "b C h w"] | None = None


class Draws(NamedTuple):
    """Of a step: which pictures, and uniform numbers for the wording of captions, their dropping, and crops and flips."""

    step: int
    index: Int[Tensor, " B"]
    wording: Float[Tensor, " B"]
    dropped: Float[Tensor, " B"]
    moves: Float[Tensor, "3 B"]


class Part(NamedTuple):
    """x0: (b, C, H, W). captions: b strings. weights: (b,) with mean 1 over the batch, or None for equal ones."""

    x0: Float[Tensor, "b C H W"]
    captions: list[str]
    weights: Float[Tensor, " b"] | None


@dataclass(frozen=True)
class Source:
    """One data set of a run. weight: of each of its pictures in the loss. latents: where they are cached."""

    data: Data
    weight: float = 1.0
    latents: LatentCache | None = None


class Batches:
    """The batches of a run.

    Args:
        sources: the data sets, from which the rows of a batch come in turn, as many of each; the first decides its shape.
        posterior: images -> (mean, std) of their latents.
        settings: of the run.
        device: of what a part holds.
    """

    def __init__(
        self,
        sources: list[Source],
        posterior: Posterior,
        settings: TrainingSettings,
        device: torch.device | str = "cpu",
    ):
        self.sources = sources
        self.posterior = posterior
        self.settings = settings
        self.device = device
        share = settings.batch_size // len(sources)
        self.drawn = Draws(0, *[torch.empty(0)] * 4)  # no step has the number 0
        self.orders = [_order(s.data, share, settings.seed, k) for k, s in enumerate(sources)]
        decodes = any(s.latents is None and not isinstance(s.data, ImageSet) for s in sources)
        self.read = ReadAhead(self._read) if decodes else self._read

    def indices(self, step: int) -> Int[Tensor, " B"]:
        """Which pictures step number `step` (from 1) sees, each in its own source."""
        return torch.stack([order.indices(step - 1) for order in self.orders], dim=1).flatten()

    def _drawn(self, step: int) -> Draws:
        """All that is drawn for a step's batch; its parts, one after the other, share the work."""
        drawn = self.drawn  # another thread, which reads ahead, may replace it meanwhile
        if drawn.step != step:
            size, seed = self.settings.batch_size, self.settings.seed
            wording, dropped = torch.rand(2, size, generator=generator_at(seed, "captions", step))
            moves = torch.rand(3, size, generator=generator_at(seed, "moves", step))
            drawn = self.drawn = Draws(step, self.indices(step), wording, dropped, moves)
        return drawn

    @torch.no_grad()
    def part(self, step: int, part: int, parts: int) -> Part:
        """The part-th of `parts` equal parts of a step's batch."""
        rows = self._rows(part, parts)
        loaded = self.read(step, part, parts)
        place = torch.cat([given.own for given in loaded]).argsort()
        texts = [text for given in loaded for text in given.captions]
        empty = (self._drawn(step).dropped[rows] < self.settings.caption_dropout).tolist()
        captions = ["" if e else texts[i] for e, i in zip(empty, place.tolist())]
        x0 = torch.cat([self._latents(given, step) for given in loaded])[place.to(self.device)]
        return Part(x0, captions, self._weights(rows))

    def _rows(self, part: int, parts: int) -> Int[Tensor, " b"]:
        size = self.settings.batch_size
        return torch.arange(part * size // parts, (part + 1) * size // parts)

    def _read(self, step: int, part: int, parts: int) -> list[Rows]:
        """The rows of a part from each source that has any, before they are on a device."""
        rows = self._rows(part, parts)
        _, index, wording, _, moves = self._drawn(step)
        shape = _shape(self.sources[0].data, int(index[0]))
        read = []
        for k, source in enumerate(self.sources):
            own = rows[rows % len(self.sources) == k]
            if len(own) and source.latents is not None:
                labels, mean, std = source.latents.batch(index[own], source.data.crops(moves[:, own]), shape)
                read.append(Rows(own, source.data.captions_of(labels, wording[own]), None, mean, std))
            elif len(own):
                of_pictures = () if shape is None else (moves[:, own], shape)
                batch = source.data.batch(index[own], wording[own], *of_pictures)
                read.append(Rows(own, batch.captions, batch.images))
        return read

    def _latents(self, given: Rows, step: int) -> Float[Tensor, "b C h w"]:
        if given.images is not None:
            mean, std = self.posterior(given.images.to(self.device))
        else:
            mean, std = given.mean.to(self.device), given.std.to(self.device)
        if std is None:
            return mean
        generator = generator_at(self.settings.seed, "posterior", step)
        noise = torch.randn(self.settings.batch_size, *mean.shape[1:], generator=generator)[given.own]
        return mean + std * noise.to(mean)

    def _weights(self, rows: Tensor) -> Float[Tensor, " b"] | None:
        if len(self.sources) == 1:
            return None
        weights = torch.tensor([source.weight for source in self.sources])
        return (weights / weights.mean())[rows % len(weights)].to(self.device)


def _order(data: Data, batch_size: int, seed: int, k: int) -> DataOrder | BucketOrder | Consecutive:
    seed = int(generator_at(seed, "source", k).initial_seed()) if k else seed
    if isinstance(data, Shards):
        return Consecutive(batch_size)
    if isinstance(data, ImageSet):
        return DataOrder(len(data.train), batch_size, seed)
    if k:  # the first source decides the shape of a batch
        return DataOrder(len(data), batch_size, seed)
    return BucketOrder(list(data.buckets.values()), batch_size, seed)


def _shape(data: Data, index: int) -> tuple[int, int] | None:
    """(height, width) of the pictures of a batch; None for a set in memory, which has one shape."""
    if isinstance(data, ImageSet):
        return None
    return (data.image_size, data.image_size) if isinstance(data, Shards) else data.sizes[index]
