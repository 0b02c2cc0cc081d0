"""DDIM ([DDIM] algorithm: eq. 12 and 16), deterministic at eta = 0, as noisy as DDPM at eta = 1."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.diffusion.predictions import eps_of_x0
from xdiffusion.samplers.contract import BoundDenoiser, Generators, OnStep, fresh_noise


@torch.no_grad()
def sample_ddim(
    denoiser: BoundDenoiser,
    x_T: Float[Tensor, "B C H W"],
    times: Float[Tensor, " n"],
    *,
    eta: float = 0.0,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Follow `times` from noise to data.

    Args:
        denoiser: `(xt, t) -> x0`, with `.schedule`.
        x_T: the starting noise, unit variance.
        times: decreasing, from where x_T is to where the sample ends (see `time_grids`).
        eta: share of the DDPM noise put back at each step, in [0, 1].
        generator: needed where eta > 0.
        on_step: called as on_step(i, xt, x0) after each step.

    Raises:
        ValueError: if eta is not in [0, 1], or above 0 without a generator.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be in [0, 1]: 0 is deterministic, 1 has DDPM's noise")
    xt = x_T
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        alpha_t, sigma_t = denoiser.schedule.alpha_sigma(t)
        alpha_next, sigma_next = denoiser.schedule.alpha_sigma(t_next)
        x0 = denoiser(xt, t)
        eps = eps_of_x0(x0, xt, alpha_t, sigma_t)
        # where a schedule is flat, both differences may round to a hair below 0
        noise_std = eta * (sigma_next / sigma_t) * (1 - (alpha_t / alpha_next) ** 2).clamp(min=0).sqrt()  # eq. 16
        xt = alpha_next * x0 + (sigma_next**2 - noise_std**2).clamp(min=0).sqrt() * eps  # eq. 12
        if noise_std > 0:
            xt = xt + noise_std * fresh_noise(xt, generator)
        if on_step is not None:
            on_step(i, xt, x0)
    return xt
