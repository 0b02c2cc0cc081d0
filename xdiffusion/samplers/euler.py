"""Euler's method on the probability-flow ODE in EDM coordinates ([EDM] eq. 1), plain and ancestral ([KDiff]).

With y = xt / alpha and level = sigma / alpha, [EDM]'s sigma, the ODE is dy/dlevel = (y - x0) / level. The ancestral form
steps below the next level and climbs back to it with fresh noise, so that the sample's level is right and its noise is new:

    up^2 = next^2 (level^2 - next^2) / level^2,    down^2 = next^2 - up^2 = next^4 / level^2

A step y + (next - level) (y - x0) / level is written x0 + next / level (y - x0): from pure noise y is so large that float32
would lose the x0 which is added to it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.samplers.contract import BoundDenoiser, Generators, OnStep, fresh_noise


@torch.no_grad()
def sample_euler(
    denoiser: BoundDenoiser,
    x_T: Float[Tensor, "B C H W"],
    times: Float[Tensor, " n"],
    *,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Follow `times` from noise to data with one denoiser call a step; in exact arithmetic DDIM at eta = 0.

    Args:
        denoiser: `(xt, t) -> x0`, with `.schedule`.
        x_T: the starting noise, unit variance.
        times: decreasing, from where x_T is to where the sample ends (see `time_grids`).
        generator: unused, the method is deterministic.
        on_step: called as on_step(i, xt, x0) after each step.
    """
    xt = x_T
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        alpha_t, sigma_t = denoiser.schedule.alpha_sigma(t)
        alpha_next, sigma_next = denoiser.schedule.alpha_sigma(t_next)
        level_t, level_next = sigma_t / alpha_t, sigma_next / alpha_next
        x0 = denoiser(xt, t)
        y = xt / alpha_t
        xt = alpha_next * (x0 + level_next / level_t * (y - x0))  # [EDM] algorithm 1, lines 4 and 5
        if on_step is not None:
            on_step(i, xt, x0)
    return xt


@torch.no_grad()
def sample_euler_ancestral(
    denoiser: BoundDenoiser,
    x_T: Float[Tensor, "B C H W"],
    times: Float[Tensor, " n"],
    *,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Follow `times` from noise to data, with fresh noise at every step but one that ends at a level of 0.

    Args:
        denoiser: `(xt, t) -> x0`, with `.schedule`.
        x_T: the starting noise, unit variance.
        times: decreasing, from where x_T is to where the sample ends (see `time_grids`).
        generator: source of the noise.
        on_step: called as on_step(i, xt, x0) after each step.

    Raises:
        ValueError: if the generator is missing.
    """
    xt = x_T
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        alpha_t, sigma_t = denoiser.schedule.alpha_sigma(t)
        alpha_next, sigma_next = denoiser.schedule.alpha_sigma(t_next)
        level_t, level_next = sigma_t / alpha_t, sigma_next / alpha_next
        level_up = level_next * (1 - (level_next / level_t) ** 2).sqrt()
        level_down = level_next**2 / level_t
        x0 = denoiser(xt, t)
        y = xt / alpha_t
        y = x0 + level_down / level_t * (y - x0)
        if level_up > 0:
            y = y + level_up * fresh_noise(xt, generator)
        xt = alpha_next * y
        if on_step is not None:
            on_step(i, xt, x0)
    return xt
