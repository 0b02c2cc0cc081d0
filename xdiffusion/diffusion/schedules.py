"""Noise schedules: how much signal and how much noise a sample holds at time t.

Every schedule maps t in [0, 1] (0 = data, 1 = noise) to the coefficients of a variance-preserving process,

    xt = alpha(t) * x0 + sigma(t) * eps,    alpha^2 + sigma^2 = 1,    logsnr = log(alpha^2 / sigma^2),

and says which number the network's time embedding sees. The coefficients are computed in float32 or better, never
under autocast. Papers: [VDM] for the log-SNR view, [iDDPM] and [CFG] for the cosine, [DDPM] and [LDM] for beta tables.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_LOGSNR = -30.0  # float32's steps before pi / 2 end at -32.8
MAX_TIMESTEPS = 100_000  # the table of a stranger's config is made before its weights are looked at


@runtime_checkable
class Schedule(Protocol):
    """What the objective, the denoiser and the samplers ask of a schedule; `t` may have any shape, values in [0, 1]."""

    def alpha_sigma(self, t: Float[Tensor, "*B"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]: ...
    def logsnr(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]: ...
    def time_of_logsnr(self, logsnr: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]: ...
    def training_time(self, u: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]: ...
    def network_time(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]: ...


class CosineSchedule:
    """The continuous cosine schedule in closed form, alpha = cos(phi), sigma = sin(phi), phi linear in t.

    logsnr(t) = -2 log tan(phi), cut to [logsnr_min, logsnr_max] by the choice of phi's end points ([CFG] section 2,
    there written with lambda). Every t in [0, 1] is a training time; the network sees 1000 t.

    Args:
        logsnr_min: log-SNR at t = 1 (pure noise), at least LEAST_LOGSNR.
        logsnr_max: log-SNR at t = 0 (data).

    Raises:
        ValueError: if not LEAST_LOGSNR <= logsnr_min < logsnr_max.
    """

    def __init__(self, logsnr_min: float = -15.0, logsnr_max: float = 15.0):
        if not LEAST_LOGSNR <= logsnr_min < logsnr_max:
            raise ValueError(f"logsnr_min={logsnr_min} must be below logsnr_max={logsnr_max} and at least {LEAST_LOGSNR:g}")
        self.phi_0, self.phi_1 = (_angle(logsnr) for logsnr in (logsnr_max, logsnr_min))

    def _phi(self, t: Tensor) -> Tensor:
        return self.phi_0 + (self.phi_1 - self.phi_0) * _at_least_float32(t)

    def alpha_sigma(self, t: Float[Tensor, "*B"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
        phi = self._phi(t)
        return phi.cos(), phi.sin()

    def logsnr(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        return -2 * self._phi(t).tan().log()

    def time_of_logsnr(self, logsnr: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        phi = (-0.5 * _at_least_float32(logsnr)).exp().atan()
        return ((phi - self.phi_0) / (self.phi_1 - self.phi_0)).clamp(0, 1)

    def training_time(self, u: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        return u

    def network_time(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        return 1000.0 * _at_least_float32(t)


class BetaSchedule:
    """A table of N noising steps, alpha_bar_n = prod_{k<=n} (1 - beta_k) ([DDPM] eq. 4), read at t = n / N.

    t = 0 is clean data (alpha = 1), t = n / N has taken n steps. Between the grid points log(sigma / alpha) is
    interpolated linearly in t, which is what samplers that choose their own noise levels need. Training draws grid points
    only. The network sees the step's index n - 1, as [DDPM] and Stable Diffusion number them.

    Args:
        num_timesteps: N.
        spacing: "linear" betas ([DDPM]), "scaled_linear" (linear in sqrt(beta), [LDM]), or "cosine" ([iDDPM] eq. 17).
        beta_start, beta_end: the first and the last beta; unused by "cosine".
        zero_terminal_snr: shift and scale sqrt(alpha_bar) so that t = 1 is pure noise ([ZTSNR] algorithm 1).

    Raises:
        ValueError: if `spacing` is unknown, num_timesteps is not in 2..MAX_TIMESTEPS, or the betas
            are not 0 < start <= end < 1.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        spacing: Literal["linear", "scaled_linear", "cosine"] = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
    ):
        if not 2 <= num_timesteps <= MAX_TIMESTEPS:
            raise ValueError(f"num_timesteps={num_timesteps} must be at least 2, and at most {MAX_TIMESTEPS:,}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}: need 0 < beta_start <= beta_end < 1")
        betas = _betas(num_timesteps, spacing, beta_start, beta_end)
        root_alpha_bar = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:
            first, last = root_alpha_bar[0].clone(), root_alpha_bar[-1].clone()
            root_alpha_bar = (root_alpha_bar - last) * first / (first - last)
        self.num_timesteps = num_timesteps
        self.alpha_bar = root_alpha_bar**2  # (N,), float64
        alpha_bar = self.alpha_bar.clamp(1e-12)  # a finite log for zero terminal SNR
        self._log_ratio = 0.5 * (torch.log1p(-alpha_bar) - alpha_bar.log())  # (N,) log(sigma / alpha)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _table_for(self, t: Tensor) -> Float[Tensor, " N"]:
        """The table on the device of t and in its dtype: copied there once, for each copy waits for the device."""
        place = t.device, t.dtype
        if place not in self._tables:
            self._tables[place] = self._log_ratio.to(*place)
        return self._tables[place]

    def _log_ratio_at(self, t: Tensor) -> Tensor:
        """log(sigma / alpha) at t, -inf at t = 0; linear between grid points n / N with n >= 1, flat below the first."""
        table = self._table_for(t)
        # index 0 is one step; rounding to 1e-4 keeps n / N in float32 on its grid point, up to N = 1000
        index = ((t * self.num_timesteps - 1) * 1e4).round() / 1e4
        low = index.floor().clamp(0, self.num_timesteps - 2).long()
        weight = (index - low).clamp(0, 1).to(table.dtype)
        value = table[low] * (1 - weight) + table[low + 1] * weight
        return torch.where(t <= 0, torch.full_like(value, -math.inf), value)

    def alpha_sigma(self, t: Float[Tensor, "*B"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
        ratio_squared = (2 * self._log_ratio_at(_at_least_float32(t))).exp()
        return (1 + ratio_squared).rsqrt(), (ratio_squared / (1 + ratio_squared)).sqrt()

    def logsnr(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        return -2 * self._log_ratio_at(_at_least_float32(t))

    def time_of_logsnr(self, logsnr: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        log_ratio = -0.5 * _at_least_float32(logsnr)
        table = self._table_for(log_ratio)
        high = torch.searchsorted(table, log_ratio.contiguous()).clamp(1, self.num_timesteps - 1)
        weight = (log_ratio - table[high - 1]) / (table[high] - table[high - 1])
        index = (high - 1) + weight.clamp(0, 1)
        return torch.where(logsnr == math.inf, torch.zeros_like(index), (index + 1) / self.num_timesteps)

    def training_time(self, u: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        return ((u * self.num_timesteps).floor() + 1).clamp(max=self.num_timesteps) / self.num_timesteps

    def network_time(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        index = _at_least_float32(t) * self.num_timesteps - 1
        return ((index * 1e4).round() / 1e4).clamp(min=0)


def _angle(logsnr: float) -> float:
    """phi with tan(phi) = sigma / alpha."""
    return math.atan(math.exp(min(-0.5 * logsnr, 700.0)))  # beyond, exp overflows where the angle is pi / 2 long since


def _betas(num_timesteps: int, spacing: str, beta_start: float, beta_end: float) -> Float[Tensor, " N"]:
    """The betas in float64."""
    if spacing == "linear":
        return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    if spacing == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    if spacing == "cosine":
        u = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        alpha_bar = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"spacing={spacing!r} is unknown; allowed: linear, scaled_linear, cosine")


def _at_least_float32(t: Tensor) -> Tensor:
    """Half precision cannot resolve 1000 steps; float64 is kept."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
