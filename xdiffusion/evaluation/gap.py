"""gap_closed: how much of the way from "the base on inverted images" to "the base on its own images" an adapter went.

For x -> -x a perfect adapted model is f(x, t) = -f_base(-x, t), whose loss on inverted images is the base's loss on
normal ones. That loss is the floor, so with losses on the same images, noise and times

    gap_closed = (L_base_inv - L_lora_inv) / (L_base_inv - L_base)

(our own measure) is 0 for an adapter that does nothing and 1 for one that is as good on its style as the base is on its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xdiffusion.evaluation.bootstrap import Groups, interval


class FixedDraws(NamedTuple):
    """index: which images; eps: the noise of each; t: the times, spread evenly over (0, 1)."""

    index: Int[Tensor, " N"]
    eps: Float[Tensor, "N C H W"]
    t: Float[Tensor, " N"]


def fixed_draws(num_images: int, shape: tuple[int, int, int], count: int = 512, seed: int = 0) -> FixedDraws:
    """The same (image, noise, time) triples for every model that is compared."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(num_images, generator=generator)[:count]
    eps = torch.randn((len(index), *shape), generator=generator)
    t = (torch.arange(len(index)) + 0.5) / len(index)
    return FixedDraws(index, eps, t[torch.randperm(len(index), generator=generator)])


def gap_closed(base: float, base_inverted: float, lora_inverted: float) -> float:
    """See the module's text; the arguments are mean losses. NaN where there is no way to go."""
    way = base_inverted - base
    return (base_inverted - lora_inverted) / way if way else math.nan


def gap_interval(losses: Float[Tensor, "3 N"], groups: Groups, *, resamples: int, seed: int) -> tuple[float, float]:
    """The bootstrap interval of `gap_closed`, of (base, base_inverted, lora_inverted) losses on the same draws.

    A draw is taken again with its three losses, so what an image adds to all of them does not count. Times are taken again
    as if they were drawn, though they are spread evenly: the interval is rather too wide than too narrow.
    """

    def gap(index: Int[Tensor, " M"]) -> float:
        return gap_closed(*losses[:, index].mean(1).tolist())

    return interval(gap, torch.arange(losses.shape[1]), groups=[groups], resamples=resamples, seed=seed)
