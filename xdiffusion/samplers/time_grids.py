"""Time grids: the decreasing times t_0 > t_1 > ... > t_n at which a sampler visits the process.

All grids are float64 tensors of n + 1 times on the CPU, from `t_max` (1 = noise) down to 0 (= data), or to the
first noise level where `last="first"` asks for that, so that one sampler step runs from times[i] to times[i + 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.diffusion.schedules import Schedule

MAX_STEPS = 100_000


def uniform_times(schedule: Schedule, steps: int, t_max: float = 1.0) -> Float[Tensor, " n"]:
    """Equally spaced in t: the natural grid of the cosine schedule, and "trailing" spacing on a beta table.

    Raises:
        ValueError: if t_max is not in (0, 1].
    """
    _check_start(t_max)
    return torch.linspace(t_max, 0, _checked(steps) + 1, dtype=torch.float64)


def logsnr_times(
    schedule: Schedule, steps: int, t_max: float = 1.0, logsnr_max: float = 10.0, logsnr_min: float = -10.0
) -> Float[Tensor, " n"]:
    """Equally spaced in log-SNR from `t_max` (or logsnr_min, if that is later) to logsnr_max, then 0 ([DPM++] section 5).

    A schedule whose log-SNR at t = 0 is logsnr_max or less is spaced evenly down to t = 0. On a beta table, where t = 0 has no
    noise at all, the even spacing ends at the first noise level if that is below logsnr_max.

    Raises:
        ValueError: if t_max is not in (0, 1], or the grid would not rise from its start to logsnr_max.
    """
    _check_start(t_max)
    first = schedule.training_time(torch.zeros(1, dtype=torch.float64)).item()
    start, cleanest, end = schedule.logsnr(torch.tensor([t_max, first, 0.0], dtype=torch.float64)).tolist()
    start = max(start, logsnr_min)
    if not start < min(cleanest, logsnr_max):
        raise ValueError(
            f"logsnr_max={logsnr_max} must be above {start:.4g}, where t_max={t_max} and logsnr_min={logsnr_min} begin"
        )
    if end <= logsnr_max:
        return schedule.time_of_logsnr(torch.linspace(start, end, _checked(steps) + 1, dtype=torch.float64))
    logsnr = torch.linspace(start, min(logsnr_max, cleanest), _checked(steps), dtype=torch.float64)
    return torch.cat([schedule.time_of_logsnr(logsnr), torch.zeros(1, dtype=torch.float64)])


def karras_times(
    schedule: Schedule, steps: int, sigma_max: float = 80.0, sigma_min: float = 0.02, rho: float = 7.0
) -> Float[Tensor, " n"]:
    """Levels sigma / alpha spaced evenly in level^(1/rho) ([EDM] eq. 5), then 0.

    The levels stay inside those that the schedule trains on: for Stable Diffusion 14.6 down to 0.029.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max, also within those levels, and rho > 0.
    """
    trained = schedule.training_time(torch.tensor([1.0, 0.0], dtype=torch.float64))
    highest, lowest = (-0.5 * schedule.logsnr(trained)).exp().tolist()
    if not (0 < sigma_min < sigma_max and max(sigma_min, lowest) < min(sigma_max, highest) and rho > 0):
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: need 0 < sigma_min < sigma_max and rho > 0, and levels "
            f"between {lowest:.4g} and {highest:.4g}, which the schedule has"
        )
    sigma_max, sigma_min = min(sigma_max, highest), max(sigma_min, lowest)
    ramp = torch.linspace(0, 1, _checked(steps), dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([schedule.time_of_logsnr(-2 * levels.log()), torch.zeros(1, dtype=torch.float64)])


def timestep_times(
    schedule: Schedule,
    steps: int,
    spacing: Literal["leading", "linspace", "half_open", "trailing"] = "half_open",
    steps_offset: int = 1,
    last: Literal["clean", "first"] = "clean",
) -> Float[Tensor, " n"]:
    """The timesteps of a beta table, numbered from 0, that Stable Diffusion is sampled at ([ZTSNR] table 2), as times.

    For the grids of diffusers' schedulers: DDIM "leading" with last="first", Euler "linspace", DPM-Solver++ "half_open".

    Args:
        schedule: a beta table of N timesteps; timestep n is t = (n + 1) / N.
        steps: of the sampler.
        spacing: "leading": multiples of N // steps from 0, plus steps_offset. "linspace": evenly from the
            last timestep to 0, fractions kept. "half_open": the same without 0, rounded. "trailing": multiples from the
            last timestep down, rounded.
        steps_offset: see "leading".
        last: where the last step ends: "clean" is t = 0, "first" the table's first noise level, where DDIM ends in Stable
            Diffusion's own code.

    Raises:
        ValueError: if an argument is unknown, the schedule is no table, or the steps do not fit into it.
    """
    num_timesteps = getattr(schedule, "num_timesteps", None)
    if num_timesteps is None:
        raise ValueError("kind=timesteps is for tables of timesteps (diffusion.schedule.kind=betas); another is uniform")
    if last not in ("clean", "first"):
        raise ValueError(f"last={last!r} is unknown; allowed: clean, first")
    _checked(steps)
    top = num_timesteps - 1
    if spacing == "leading":
        index = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (num_timesteps // steps) + steps_offset
    elif spacing == "linspace":
        index = torch.linspace(top, 0, steps, dtype=torch.float64)
    elif spacing == "half_open":
        index = torch.linspace(top, 0, steps + 1, dtype=torch.float64)[:-1].round()
    elif spacing == "trailing":
        index = torch.linspace(num_timesteps, 0, steps + 1, dtype=torch.float64)[:-1].round() - 1
    else:
        raise ValueError(f"spacing={spacing!r} is unknown; allowed: leading, linspace, half_open, trailing")
    end = torch.tensor([1 / num_timesteps if last == "first" else 0.0], dtype=torch.float64)
    times = torch.cat([(index + 1) / num_timesteps, end])
    if times[0] > 1 or (times.diff() >= 0).any():
        raise ValueError(
            f"sampling steps={steps} with spacing={spacing}, steps_offset={steps_offset} and last={last} do not fall from "
            f"timestep {top} to {'the first' if last == 'first' else 'clean data'}"
        )
    return times


def _check_start(t_max: float) -> None:
    if not 0 < t_max <= 1:
        raise ValueError(f"t_max={t_max} must be above 0 and at most 1")


def _checked(steps: int) -> int:
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"sampling steps={steps} must be at least 1, and at most {MAX_STEPS:,}")
    return steps
