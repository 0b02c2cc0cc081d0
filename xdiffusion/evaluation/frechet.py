"""Frechet distance between two sets of features, each read as a Gaussian ([FID] eq. 6).

d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """The squared distance d^2 >= 0 of two feature sets, in float64.

    tr (S_1 S_2)^(1/2) is the sum of the square roots of the eigenvalues of S_1^(1/2) S_2 S_1^(1/2), which is symmetric.

    Raises:
        ValueError: if either set has fewer than two rows, or any feature is not finite.
    """
    for name, features in (("first", a), ("second", b)):
        if len(features) < 2:
            raise ValueError(f"the {name} set has {len(features)} rows; a covariance needs at least 2")
        if not features.isfinite().all():
            raise ValueError(f"the {name} set holds features that are not finite")
    mean_a, cov_a = _gaussian(a)
    mean_b, cov_b = _gaussian(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)
