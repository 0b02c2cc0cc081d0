"""Diversity: how far the samples of one class lie apart, beside real images of it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def within_class_distance(features: Float[Tensor, "N D"], labels: Int[Tensor, " N"]) -> float:
    """Mean distance between two different samples of a class, averaged over the classes that have two.

    Raises:
        ValueError: if no class has two samples.
    """
    classes = [features[labels == k].double() for k in labels.unique()]
    means = [torch.pdist(rows).mean() for rows in classes if len(rows) > 1]
    if not means:
        raise ValueError(f"{len(features)} samples: no class has two, which a distance needs")
    return float(torch.stack(means).mean())


def mean_distance(distances: Float[Tensor, "N N"], index: Int[Tensor, " M"]) -> float:
    """The mean over pairs of different places in `index`, by a table of the distances between all."""
    return float(distances[index][:, index].sum() / (len(index) * (len(index) - 1)))


def diversity(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    real: Float[Tensor, "M D"],
    real_labels: Int[Tensor, " M"],
) -> float:
    """The samples' distance over the real images': 0 is one picture per class, 1 is as varied as the data.

    NaN where the real images are all one.
    """
    of_real = within_class_distance(real, real_labels)
    return within_class_distance(features, labels) / of_real if of_real else math.nan
