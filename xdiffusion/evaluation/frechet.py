"""Frechet distance between two sets of features, each read as a Gaussian ([FID] eq. 6).

d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """The squared distance d^2 >= 0 of two feature sets, in float64.

    With S_1 = A^T A and S_2 = B^T B, tr (S_1 S_2)^(1/2) is the sum of the singular values of A B^T, and of A = Q R only R
    counts: a matrix of the number of rows or of features, whichever is smaller.

    Raises:
        ValueError: if either set has fewer than two rows, or any feature is not finite.
    """
    for name, features in (("first", a), ("second", b)):
        if len(features) < 2:
            raise ValueError(f"the {name} set has {len(features)} rows; a covariance needs at least 2")
        if not features.isfinite().all():
            raise ValueError(f"the {name} set holds features that are not finite")
    mean_a, deviations_a = _gaussian(a)
    mean_b, deviations_b = _gaussian(b)
    R_a, R_b = (torch.linalg.qr(deviations, mode="r").R for deviations in (deviations_a, deviations_b))
    cross = torch.linalg.svdvals(R_a @ R_b.T).sum()
    spread = deviations_a.square().sum() + deviations_b.square().sum()
    return max(0.0, float((mean_a - mean_b).square().sum() + spread - 2 * cross))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and deviations from it whose product A^T A is the covariance."""
    features = features.double()
    mean = features.mean(dim=0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5
