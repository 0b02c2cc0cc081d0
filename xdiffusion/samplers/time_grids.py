"""Time grids: the decreasing times t_0 > t_1 > ... > t_n at which a sampler visits the process.

All grids are float64 tensors of n + 1 times on the CPU, from `t_max` (1 = noise) down to 0 (= data), so that one
sampler step runs from times[i] to times[i + 1].
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.diffusion.schedules import Schedule


def uniform_times(schedule: Schedule, steps: int, t_max: float = 1.0) -> Float[Tensor, " n"]:
    """Equally spaced in t: the natural grid of the cosine schedule, and "trailing" spacing on a beta table."""
    return torch.linspace(t_max, 0, _checked(steps) + 1, dtype=torch.float64)


def logsnr_times(
    schedule: Schedule, steps: int, t_max: float = 1.0, logsnr_max: float = 10.0, logsnr_min: float = -10.0
) -> Float[Tensor, " n"]:
    """Equally spaced in log-SNR from `t_max` (or logsnr_min, if that is later) to logsnr_max, then 0 ([DPM++] section 5).

    Where the schedule's data end, t = 0, is no cleaner than logsnr_max, the even spacing goes on to that end.
    """
    start, end = schedule.logsnr(torch.tensor([t_max, 0.0], dtype=torch.float64)).tolist()
    start = max(start, logsnr_min)
    if end <= logsnr_max:
        return schedule.time_of_logsnr(torch.linspace(start, end, _checked(steps) + 1, dtype=torch.float64))
    logsnr = torch.linspace(start, logsnr_max, _checked(steps), dtype=torch.float64)
    return torch.cat([schedule.time_of_logsnr(logsnr), torch.zeros(1, dtype=torch.float64)])


def karras_times(
    schedule: Schedule, steps: int, sigma_max: float = 80.0, sigma_min: float = 0.02, rho: float = 7.0
) -> Float[Tensor, " n"]:
    """Noise levels s_i = sigma / alpha spaced evenly in s^(1/rho) ([EDM] eq. 5), then 0."""
    ramp = torch.linspace(0, 1, _checked(steps), dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([schedule.time_of_logsnr(-2 * levels.log()), torch.zeros(1, dtype=torch.float64)])


def _checked(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"sampling steps={steps} must be at least 1")
    return steps
