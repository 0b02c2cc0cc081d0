"""DPM-Solver++(2M): a second-order multistep solver in half log-SNR ([DPM++] algorithm 2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.samplers.contract import BoundDenoiser, Generators, OnStep


@torch.no_grad()
def sample_dpm_solver(
    denoiser: BoundDenoiser,
    x_T: Float[Tensor, "B C H W"],
    times: Float[Tensor, " n"],
    *,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Follow `times` from noise to data with one denoiser call a step; the first and the last step are first order.

    Args:
        denoiser: `(xt, t) -> x0`, with `.schedule`.
        x_T: the starting noise, unit variance.
        times: decreasing, from where x_T is to where the sample ends (see `time_grids`).
        generator: unused, the method is deterministic.
        on_step: called as on_step(i, xt, x0) after each step.
    """
    xt = x_T
    x0_last = h_last = None
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        _, sigma_t = denoiser.schedule.alpha_sigma(t)
        alpha_next, sigma_next = denoiser.schedule.alpha_sigma(t_next)
        h = (denoiser.schedule.logsnr(t_next) - denoiser.schedule.logsnr(t)) / 2  # lambda = logsnr / 2
        x0 = denoiser(xt, t)
        direction = x0
        if x0_last is not None and i < len(times) - 2 and h_last > 0:  # two times of a table may be one noise level
            r = h_last / h
            direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_last  # D_i, line 9
        xt = (sigma_next / sigma_t) * xt - alpha_next * torch.expm1(-h) * direction  # line 10
        x0_last, h_last = x0, h
        if on_step is not None:
            on_step(i, xt, x0)
    return xt
