"""Bootstrap intervals ([Bootstrap] chapter 13): how far a score would move if it were measured on other samples.

    interval = quantiles(score*)                                   score*: the score of groups drawn with replacement
    centred  = score + quantiles(score* - mean(score*))

A Frechet distance of N samples is too large by something of order 1/N, and its resampled values are so once more. Moved
back, the interval says where another draw of as many samples would fall, which is what two models at the same N are
compared by. Rows that depend on each other, as variants of one image do, are one group and are drawn together. Of rows that
were made in fixed numbers, as samples of each class are, as many of each stratum are drawn: chance had no part in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Groups = Int[Tensor, "_"]  # equal for rows that depend on each other


def interval(
    statistic: Callable[..., float],
    *rows: Tensor,
    groups: Sequence[Groups | None] | None = None,
    strata: Sequence[Groups | None] | None = None,
    centred: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval of `statistic(*rows)` at this level; sets of rows are resampled apart.

    Args:
        statistic: of the sets of rows; a score that needs several tensors of one set takes the set's indices.
        rows: one tensor per set, (N, ...).
        groups: of each set's rows; None where these are independent.
        strata: of each set's rows; None where their numbers are of chance too. A set has groups or strata.
        centred: for a score whose size depends on the number of different rows.
        resamples: how often each set is drawn again.
        seed: of the drawing.
        level: share of resampled scores inside.

    Raises:
        ValueError: if resamples is below 2, or the level is not in (0, 1).
    """
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"resamples={resamples}, level={level}: need at least 2, and a level in (0, 1)")
    generator = torch.Generator().manual_seed(seed)
    none = [None] * len(rows)
    draws = [_drawer(len(r), g, s, generator) for r, g, s in zip(rows, groups or none, strata or none)]
    drawn = (statistic(*(r[draw()] for r, draw in zip(rows, draws))) for _ in range(resamples))
    values = torch.tensor(list(drawn), dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    shift = statistic(*rows) - values.mean() if centred else 0.0
    low, high = (values.quantile(tails) + shift).tolist()
    return low, high


def mean_interval(
    rows: Tensor, groups: Groups | None = None, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """`interval` of the mean of rows (N,)."""
    return interval(_mean, rows, groups=[groups], resamples=resamples, seed=seed, level=level)


def _drawer(count: int, groups: Groups | None, strata: Groups | None, generator: torch.Generator) -> Callable[[], Tensor]:
    """What draws the indices of a set's rows again."""
    if strata is not None:
        sizes = strata.unique(return_counts=True)[1]
        size = sizes.repeat_interleave(sizes)  # of each row's stratum, in the order of these
        order, first = strata.argsort(stable=True), (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        return lambda: order[first + (torch.rand(count, generator=generator, dtype=torch.float64) * size).long()]
    table = _members(torch.arange(count) if groups is None else groups)

    def draw() -> Tensor:
        index = table[torch.randint(len(table), (len(table),), generator=generator)]
        return index[index >= 0]

    return draw


def _members(groups: Groups) -> Int[Tensor, "G largest"]:
    """Which rows are of each group; -1 fills up the smaller ones."""
    sizes = groups.unique(return_counts=True)[1].tolist()
    return pad_sequence(groups.argsort(stable=True).split(sizes), batch_first=True, padding_value=-1)


def _mean(rows: Tensor) -> float:
    return rows.double().mean().item()
