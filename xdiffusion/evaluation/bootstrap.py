"""Bootstrap intervals ([Bootstrap] chapter 13): how far a score would move if it were measured on other samples.

    interval = quantiles(score*)                                   score*: the score of groups drawn with replacement
    centred  = score + quantiles(score* - mean(score*))

A Frechet distance of N samples is too large by something of order 1/N, and its resampled values are so once more. Moved
back, the interval says where another draw of as many samples would fall, which is what two models at the same N are
compared by. Rows that depend on each other, as variants of one image do, are one group and are drawn together.
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
    tables = [_members(torch.arange(len(r)) if of is None else of) for r, of in zip(rows, groups or [None] * len(rows))]

    def drawn(rows: Tensor, table: Tensor) -> Tensor:
        index = table[torch.randint(len(table), (len(table),), generator=generator)]
        return rows[index[index >= 0]]

    values = torch.tensor([statistic(*map(drawn, rows, tables)) for _ in range(resamples)], dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    shift = statistic(*rows) - values.mean() if centred else 0.0
    low, high = (values.quantile(tails) + shift).tolist()
    return low, high


def mean_interval(
    rows: Tensor, groups: Groups | None = None, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """`interval` of the mean of rows (N,)."""
    return interval(_mean, rows, groups=[groups], resamples=resamples, seed=seed, level=level)


def _members(groups: Groups) -> Int[Tensor, "G largest"]:
    """Which rows are of each group; -1 fills up the smaller ones."""
    sizes = groups.unique(return_counts=True)[1].tolist()
    return pad_sequence(groups.argsort(stable=True).split(sizes), batch_first=True, padding_value=-1)


def _mean(rows: Tensor) -> float:
    return rows.double().mean().item()
