"""How two sets of features cover each other: precision and recall, density and coverage.

The manifold of a set is read as the union of the balls around its points that reach to their k-th neighbour in it.

    precision: share of generated points inside a real ball           ([ImprovedPR] eq. 1 and 2)
    recall:    share of real points inside a generated ball           (the same, sets exchanged)
    density:   real balls that a generated point lies in, over k      ([DensityCoverage] section 3)
    coverage:  share of real balls that hold a generated point        (the same)

Precision and density ask for quality, recall and coverage for variety. Density may exceed 1. For two sets of one
distribution and equal size N, coverage has the mean 1 - prod_{i=1..k} (N - i) / (2N - i), about 1 - 2^-k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

NEIGHBOURS = 5
BLOCK = 1024


class Overlap(NamedTuple):
    """The rows whose means are the four scores: of N real and M generated points."""

    precision: Float[Tensor, " M"]
    recall: Float[Tensor, " N"]
    density: Float[Tensor, " M"]
    coverage: Float[Tensor, " N"]


def overlap(real: Float[Tensor, "N D"], generated: Float[Tensor, "M D"], k: int = NEIGHBOURS) -> Overlap:
    """Both sets' points in the balls of the other, in float64 and in blocks of rows.

    Args:
        real, generated: features; the scores depend on N and M, so compare at equal numbers.
        k: the neighbour that the radii reach to, the point itself not counted.

    Raises:
        ValueError: if a set has no more than k points.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"{len(real)} real and {len(generated)} generated points: k={k} neighbours need more of both")
    real, generated = real.double(), generated.double()
    radius_real, radius_generated = _radii(real, k), _radii(generated, k)
    balls_around = torch.zeros(len(generated), dtype=torch.float64)  # real balls that each generated point lies in
    recalled, covered = [], []
    for rows, radius in zip(real.split(BLOCK), radius_real.split(BLOCK)):
        distance = _distances(rows, generated)  # (block, M)
        inside_real = distance <= radius[:, None]
        balls_around += inside_real.sum(0)
        covered.append(inside_real.any(1))
        recalled.append((distance <= radius_generated).any(1))
    return Overlap(
        precision=(balls_around > 0).double(),
        recall=torch.cat(recalled).double(),
        density=balls_around / k,
        coverage=torch.cat(covered).double(),
    )


def _radii(points: Tensor, k: int) -> Tensor:
    """The distance of each point to its k-th neighbour; the nearest, at distance 0, is the point itself."""
    return torch.cat([_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(BLOCK)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # exact: equal points are at distance 0
