"""Memorisation: are samples nearer to training images than new real images are?

    data_copying = P(d(sample) < d(held-out)) + P(equal) / 2        ([DataCopying]: the U statistic, as a share)
    copies       = share of samples with d_1 < d_2 / 3              ([Memorise]: nearest beside second nearest)

d is the distance to the nearest training image. data_copying is 0.5 for samples that are to the training set what new
data are, and 1 for copies of it; guidance, which draws typical images, raises it too. The second sees a copy of one
training image alone: where the training set holds variants of each image, d_2 is small as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 512
COPY_RATIO = 1 / 3


class Nearest(NamedTuple):
    """distance: (N, k) to the k nearest references, rising; index: (N, k) which they are."""

    distance: Float[Tensor, "N k"]
    index: Int[Tensor, "N k"]

    def rows(self, first: int, last: int | None = None) -> Nearest:
        """Those of some images."""
        return Nearest(self.distance[first:last], self.index[first:last])


def nearest(images: Float[Tensor, "N C H W"], references: Iterable[Tensor], k: int = 2) -> Nearest:
    """The k nearest references of each image; all of them where there are fewer.

    Args:
        images: in [-1, 1].
        references: blocks (M, C, H, W) in [-1, 1], one of which is held at a time.

    Returns:
        Distances as root mean squares of the difference in brightness, in [0, 1].
    """
    queries, first = images.flatten(1), 0
    found = Nearest(torch.empty(len(images), 0), torch.empty(len(images), 0, dtype=torch.long))
    for block in references:
        points = block.flatten(1)
        of_block = [_nearest_points(rows, points, min(k, len(points))) for rows in queries.split(BLOCK)]
        distance, index = (torch.cat(parts) for parts in zip(*of_block))
        distance, index = torch.cat([found.distance, distance], 1), torch.cat([found.index, first + index], 1)
        distance, order = distance.sort(dim=1, stable=True)
        found = Nearest(distance[:, :k], index.gather(1, order)[:, :k])
        first += len(points)
    return found


def _nearest_points(rows: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest points of each row, and which these are."""
    # the expanded square finds the neighbours quickly, but cannot tell a copy from rounding
    index = (points.square().sum(1) - 2 * rows @ points.T).topk(k, largest=False).indices
    return (rows[:, None] - points[index]).square().mean(2).sqrt() / 2, index


def median(distance: Float[Tensor, " N"]) -> float:
    """The median; where N is even, the lower of the two values in the middle."""
    return float(distance.median())


def data_copying(of_samples: Float[Tensor, " N"], of_held_out: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """For each held-out image the share of samples that are nearer to the training set, equally near ones as halves.

    The mean is P(a sample is nearer than a held-out image) + P(equally near) / 2.
    """
    samples, of_held_out = of_samples.sort().values, of_held_out.contiguous()
    below, up_to = (torch.searchsorted(samples, of_held_out, right=right) for right in (False, True))
    return (below + up_to).double() / (2 * len(samples))


def copied(distance: Float[Tensor, "N k"]) -> Float[Tensor, " N"]:
    """1 where the nearest reference is closer than a third of the way to the second nearest, else 0."""
    return (distance[:, 0] < COPY_RATIO * distance[:, 1]).float()
