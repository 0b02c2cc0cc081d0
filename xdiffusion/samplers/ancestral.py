"""Ancestral sampling ([DDPM] algorithm 2): draw the next xt from the Gaussian posterior q(x_next | xt, x0)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.samplers.contract import BoundDenoiser, Generators, OnStep, fresh_noise


@torch.no_grad()
def sample_ancestral(
    denoiser: BoundDenoiser,
    x_T: Float[Tensor, "B C H W"],
    times: Float[Tensor, " n"],
    *,
    variance: Literal["posterior", "beta"] = "posterior",
    generator: Generators | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Follow `times` from noise to data, with fresh noise at every step but the last.

    Args:
        denoiser: `(xt, t) -> x0`, with `.schedule`.
        x_T: the starting noise, unit variance.
        times: decreasing, from where x_T is to where the sample ends (see `time_grids`).
        variance: of the reverse step: "posterior" (beta tilde, [DDPM] eq. 7) or "beta" (its upper bound, section 3.2).
        generator: source of the noise.
        on_step: called as on_step(i, xt, x0) after each step.

    Raises:
        ValueError: if `variance` is unknown or the generator is missing.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance={variance!r} is unknown; allowed: posterior, beta")
    xt = x_T
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        alpha_t, sigma_t = denoiser.schedule.alpha_sigma(t)
        alpha_next, sigma_next = denoiser.schedule.alpha_sigma(t_next)
        x0 = denoiser(xt, t)
        # q(xt | x_next) = N(ratio x_next, beta): eq. 2 for a step of any length
        ratio = alpha_t / alpha_next
        beta = (1 - ratio**2).clamp(min=0)  # where a schedule is flat, it may round to a hair below 0
        xt = (alpha_next * beta * x0 + ratio * sigma_next**2 * xt) / sigma_t**2  # eq. 7, mean
        if i < len(times) - 2:
            noise_variance = beta if variance == "beta" else beta * sigma_next**2 / sigma_t**2  # eq. 7, beta tilde
            xt = xt + noise_variance.sqrt() * fresh_noise(xt, generator)
        if on_step is not None:
            on_step(i, xt, x0)
    return xt
