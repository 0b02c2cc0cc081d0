"""The held-out denoising loss at each noise level.

A loss per log-SNR says at which scale of detail a model is good or bad. It is put in eps space whatever the network
predicts, where it is also the integrand of the continuous-time bound ([VDM] section 5.1): 1 is "predicts nothing".

    |eps - eps_hat|^2 = |v - v_hat|^2 alpha^2 = |x0 - x0_hat|^2 alpha^2 / sigma^2        at the same xt
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.evaluation.bootstrap import Groups, mean_interval

LOGSNR_MAX, LOGSNR_MIN = 8.0, -8.0  # beyond them there is nothing left to tell
BINS = 16


class LossCurve(NamedTuple):
    """logsnr: the bins' centres; loss: their mean losses; low, high: bootstrap intervals; empty where none were asked for, or
    a bin has a single group, from which no spread can be told."""

    logsnr: list[float]
    loss: list[float]
    low: list[float]
    high: list[float]


def logsnr_at(u: Float[Tensor, " N"], span: tuple[float, float] = (LOGSNR_MAX, LOGSNR_MIN)) -> Float[Tensor, " N"]:
    """u in (0, 1), spread evenly, to log-SNRs spread evenly from the first of `span` down to the second."""
    return span[0] + (span[1] - span[0]) * u


def in_eps_space(
    error: Float[Tensor, " N"],
    prediction: Literal["eps", "v", "x0"],
    alpha: Float[Tensor, " N"],
    sigma: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Squared errors of the network's own output as squared errors of eps."""
    return error * {"eps": torch.ones_like(alpha), "v": alpha**2, "x0": (alpha / sigma) ** 2}[prediction]


def loss_curve(
    error: Float[Tensor, " N"],
    u: Float[Tensor, " N"],
    groups: Groups | None = None,
    span: tuple[float, float] = (LOGSNR_MAX, LOGSNR_MIN),
    resamples: int = 0,
) -> LossCurve:
    """Mean errors by bins of log-SNR; u and span as for `logsnr_at`, and no bin is empty where u is spread evenly.

    Errors of one group depend on each other; without groups all are independent.
    """
    bins = min(BINS, len(u))
    which = (u * bins).long().clamp(max=bins - 1)
    rows = [error[which == k] for k in range(bins)]
    groups = torch.arange(len(u)) if groups is None else groups
    centres = logsnr_at((torch.arange(bins) + 0.5) / bins, span)
    members = [groups[which == k] for k in range(bins)]
    told = resamples and all(len(of.unique()) > 1 for of in members)
    bounds = [mean_interval(r, of, resamples=resamples) for r, of in zip(rows, members)] if told else []
    return LossCurve(
        centres.tolist(), [float(r.mean()) for r in rows], [low for low, _ in bounds], [high for _, high in bounds]
    )
