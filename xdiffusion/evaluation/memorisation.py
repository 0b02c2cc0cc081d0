"""Memorisation: are samples nearer to training images than new real images are?

    data_copying = P(d(sample) < d(held-out)) + P(equal) / 2        ([DataCopying]: the U statistic, as a share)
    copies       = share of samples with d_1 < d_2 / 3              ([Memorise]: nearest beside second nearest)

d is the distance to the nearest training image. data_copying is 0.5 for samples that are to the training set what new
data are, and 1 for copies of it; guidance, which draws typical images, raises it too. The second sees a copy of one
training image alone: where the training set holds variants of each image, d_2 is small as well.
"""

from __future__ import annotations

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


def nearest(images: Float[Tensor, "N C H W"], references: Float[Tensor, "M C H W"], k: int = 2) -> Nearest:
    """The k nearest references of each image.

    Args:
        images, references: in [-1, 1].
        k: at most M.

    Returns:
        Distances as root mean squares of the difference in brightness, in [0, 1].
    """
    queries, points = images.flatten(1), references.flatten(1)
    squares = points.square().sum(1)
    # the expanded square finds the neighbours quickly, but cannot tell a copy from rounding
    index = torch.cat([(squares - 2 * rows @ points.T).topk(k, largest=False).indices for rows in queries.split(BLOCK)])
    exact = [(rows[:, None] - points[i]).square().mean(2).sqrt() / 2 for rows, i in _blocks(queries, index)]
    distance, order = torch.cat(exact).sort(dim=1)
    return Nearest(distance, index.gather(1, order))


def _blocks(queries: Tensor, index: Tensor) -> zip:
    return zip(queries.split(BLOCK), index.split(BLOCK))


def data_copying(of_samples: Float[Tensor, " N"], of_held_out: Float[Tensor, " M"]) -> float:
    """P(a sample is nearer to the training set than a held-out image) + P(equally near) / 2, in [0, 1]."""
    held_out, of_samples = of_held_out.sort().values, of_samples.contiguous()
    above = len(held_out) - torch.searchsorted(held_out, of_samples, right=True)
    equal = torch.searchsorted(held_out, of_samples, right=True) - torch.searchsorted(held_out, of_samples)
    return float((above + equal / 2).double().mean() / len(held_out))


def copied(distance: Float[Tensor, "N k"]) -> Float[Tensor, " N"]:
    """1 where the nearest reference is closer than a third of the way to the second nearest, else 0."""
    return (distance[:, 0] < COPY_RATIO * distance[:, 1]).float()
