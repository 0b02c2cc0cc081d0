"""Intervals of shares, right at 0 and 1, where a bootstrap has no width: no copy among 40 samples is not proof of none.

    share of N trials:           the p that neither tail of the binomial distribution rejects     ([ClopperPearson])
    share of M N pairs (a < b):  the p with |p - share| <= z sd(p)                                ([Newcombe] method 5)

The first holds the true share at least as often as it says. The second is a score interval like Wilson's: the variance is
that at p, not at the share that was found, so it does not vanish there. Trials in groups that depend on each other, as
variants of one image do, count as the number of independent trials whose mean would vary as much ([KornGraubard]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.evaluation.bootstrap import Groups

HALVINGS = 50


def share_interval(hits: Float[Tensor, " N"], groups: Groups | None = None, *, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of rows that are 0 or 1; without groups they are independent."""
    trials = len(hits) if groups is None else round(independent(hits, groups))
    count, tail = int(hits.sum()), (1 - level) / 2
    low, miss = (_lowest_share(k * trials // len(hits), trials, tail) for k in (count, len(hits) - count))
    return low, 1 - miss


def pairs_share_interval(share: float, samples: float, others: float, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share of all pairs of `samples` and `others` independent ones (a U statistic over their product)."""
    z = NormalDist().inv_cdf((1 + level) / 2)

    def too_far(p: float) -> bool:
        # the variance of two exponential distributions, with their numbers harmonised
        pairs = ((samples + others) / 2 - 1) * ((1 - p) / (2 - p) + p / (1 + p))
        return (p - share) ** 2 > z**2 * p * (1 - p) * (1 + pairs) / (samples * others)

    low = 0.0 if share == 0 else _boundary(too_far, 0.0, share)
    high = 1.0 if share == 1 else _boundary(too_far, 1.0, share)
    return low, high


def independent(rows: Float[Tensor, " N"], groups: Groups) -> float:
    """How many independent rows would have a mean as uncertain as these, of which those of a group depend on each other.

    N over the design effect, the ratio of the mean's two variances: by groups and by rows. Of equal rows, which show no
    variance, one of each group.
    """
    group = groups.unique(return_inverse=True)[1]
    count, number = len(rows), int(group.max()) + 1
    residuals = rows.double() - rows.double().mean()
    of_rows = float(residuals.square().sum()) / (count - 1)
    if not of_rows or number == 1:
        return float(number)
    sums = torch.zeros(number, dtype=torch.float64).index_add(0, group, residuals)
    of_groups = float(sums.square().sum()) / count * number / (number - 1)
    return count * min(1.0, of_rows / of_groups) if of_groups else float(count)


def _lowest_share(count: int, trials: int, tail: float) -> float:
    """The p at which `count` or more of the trials hit with the chance `tail`."""
    if count == 0:
        return 0.0
    k = torch.arange(count, trials + 1, dtype=torch.float64)
    choices = math.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)

    def too_rare(p: float) -> bool:
        return float((choices + k * math.log(p) + (trials - k) * math.log1p(-p)).logsumexp(0)) < math.log(tail)

    return _boundary(too_rare, 0.0, 1.0)


def _boundary(outside: Callable[[float], bool], out: float, within: float) -> float:
    """Where `outside` changes between a point that is and one that is not; neither is asked."""
    for _ in range(HALVINGS):
        middle = (out + within) / 2
        out, within = (middle, within) if outside(middle) else (out, middle)
    return within
