"""Sampling that starts from given data instead of noise ([SDEdit]), as a whole or around what a mask keeps.

    xt = alpha x0 + sigma eps at a time between data and noise, and from there on any sampler of this package.

Where a mask keeps the data, the estimate of x0 is replaced by it. With the eps that the sampling started from, a
deterministic sampler then passes exactly through alpha x0 + sigma eps there: blending after each step, without a word of
it in the samplers.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.diffusion.schedules import Schedule
from xdiffusion.samplers.contract import BoundDenoiser


def steps_left(steps: int, strength: float) -> int:
    """How many of a grid's steps are taken: int(strength * steps), which is none at strength 0 alone.

    Raises:
        ValueError: if strength is not in [0, 1], or so small that no step is left.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} must be in [0, 1]: 0 keeps the image, 1 draws it anew")
    left = int(steps * strength)
    if strength > 0 and not left:
        digits = max(3, len(str(steps)))
        least = math.ceil(10**digits / steps) / 10**digits
        raise ValueError(
            f"strength={strength} of {steps} steps is less than one: take more steps, or at least {least:.{digits}f}"
        )
    return left


def times_from(times: Float[Tensor, " n"], strength: float) -> Float[Tensor, " m"]:
    """The last `steps_left` steps of a grid; at strength 0 its last time alone.

    Raises:
        ValueError: see `steps_left`.
    """
    steps = len(times) - 1
    return times[steps - steps_left(steps, strength) :]


def noised(
    x0: Float[Tensor, "B C H W"], eps: Float[Tensor, "B C H W"], schedule: Schedule, times: Float[Tensor, " n"]
) -> Float[Tensor, "B C H W"]:
    """xt at the first of `times`, where sampling goes on; x0 itself if no step is left."""
    if len(times) < 2:
        return x0
    alpha, sigma = schedule.alpha_sigma(times[0])
    return alpha * x0 + sigma * eps


class MaskedDenoiser:
    """A denoiser that knows a part of the data.

    Args:
        denoiser: `(xt, t) -> x0`, with `.schedule`.
        x0: the known data.
        mask: (1 or B, 1, H, W): 1 where data are to be drawn, 0 where x0 stays.
    """

    def __init__(self, denoiser: BoundDenoiser, x0: Float[Tensor, "B C H W"], mask: Float[Tensor, "N 1 H W"]):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.x0 = x0
        self.mask = mask

    def __call__(self, xt: Float[Tensor, "B C H W"], t: Float[Tensor, ""]) -> Float[Tensor, "B C H W"]:
        return self.kept(self.denoiser(xt, t))

    def kept(self, x0: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Drawn data with the known ones where the mask keeps them."""
        return torch.where(self.mask > 0.5, x0, self.x0)
