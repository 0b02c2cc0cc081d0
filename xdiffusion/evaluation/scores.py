"""Scores by name, each with its interval where resamples are asked for; `_real` is the same score of real images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from xdiffusion.evaluation.bootstrap import Groups, interval, mean_interval
from xdiffusion.evaluation.frechet import frechet_distance
from xdiffusion.evaluation.memorisation import Nearest, copied, data_copying, median
from xdiffusion.evaluation.overlap import NEIGHBOURS, overlap
from xdiffusion.evaluation.shares import independent, pairs_share_interval, share_interval

SHARES = ("prompt_accuracy", "precision", "recall", "coverage", "copies")  # means of rows that are 0 or 1
OF_HELD_OUT = ("recall", "coverage")  # whose rows are of held-out images, not of samples


class Features(NamedTuple):
    """Rows of features that are compared.

    known: of training images, for the floor and the `_real` scores; without them there are none.
    groups: of held-out images.
    """

    samples: Float[Tensor, "N D"]
    held_out: Float[Tensor, "M D"]
    known: Float[Tensor, "K D"] | None
    groups: Groups | None = None


def mean_scores(rows: Mapping[str, Tensor], resamples: int, seed: int, groups: Groups | None = None) -> dict[str, Any]:
    """The mean of each score's rows (N,); groups: of held-out images."""
    scores: dict[str, Any] = {name: float(r.mean()) for name, r in rows.items()}
    if resamples:
        for name, r in rows.items():
            of = groups if name in OF_HELD_OUT else None
            drawn = share_interval(r, of) if name in SHARES else mean_interval(r, of, resamples=resamples, seed=seed)
            scores[f"{name}_interval"] = drawn
    return scores


def frechet_scores(features: Features, resamples: int, seed: int, classes: Groups | None = None) -> dict[str, Any]:
    """The Frechet distance to held-out images; its floor is that of training images. classes: asked for, of each sample."""
    samples, held_out, known, groups = features
    scores: dict[str, Any] = {"frechet_distance": frechet_distance(samples, held_out)}
    if known is not None:
        scores["frechet_floor"] = frechet_distance(known, held_out)
    if resamples:
        drawn = {"groups": [None, groups], "strata": [classes, None], "resamples": resamples, "seed": seed}
        scores["frechet_distance_interval"] = interval(frechet_distance, samples, held_out, centred=True, **drawn)
    return scores


def overlap_scores(features: Features, resamples: int, seed: int) -> dict[str, Any]:
    """Precision, recall, density and coverage, where there are enough of both.

    The neighbourhoods are held fixed in the intervals, which are of the chance of the points in them: one that a bootstrap
    draws twice would shrink them.
    """
    samples, held_out, known, groups = features
    if min(len(samples), len(held_out)) <= NEIGHBOURS:
        return {}
    scores = mean_scores(overlap(held_out, samples)._asdict(), resamples, seed, groups)
    if known is not None and len(known) > NEIGHBOURS:
        scores |= {f"{name}_real": float(r.mean()) for name, r in overlap(held_out, known)._asdict().items()}
    return scores


def memorisation_scores(
    of_samples: Nearest, of_held_out: Nearest | None, resamples: int, seed: int, groups: Groups | None = None
) -> dict[str, Any]:
    """How near samples come to the training images, beside how near held-out ones come. groups: of held-out images."""
    distance = of_samples.distance[:, 0]
    scores: dict[str, Any] = {"nearest_distance": median(distance)}
    if resamples:
        scores["nearest_distance_interval"] = interval(median, distance, resamples=resamples, seed=seed)
    if of_samples.distance.shape[1] > 1:
        scores |= mean_scores({"copies": copied(of_samples.distance)}, resamples, seed)
    if of_held_out is not None:
        nearer = data_copying(distance, of_held_out.distance[:, 0])
        share = float(nearer.mean())
        scores |= {"nearest_distance_real": median(of_held_out.distance[:, 0]), "data_copying": share}
        if resamples:
            others = len(nearer) if groups is None else independent(nearer, groups)
            scores["data_copying_interval"] = pairs_share_interval(share, len(distance), others)
    return scores
