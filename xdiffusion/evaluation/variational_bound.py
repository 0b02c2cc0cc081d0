"""Bits per dimension of held-out images by the variational bound of a discrete DDPM ([DDPM] eq. 5).

    L = L_N + sum_{n=2..N} L_{n-1} + L_0
    L_N     = KL(q(x_N | x0) | N(0, I))
    L_{n-1} = KL(q(x_{n-1} | x_n, x0) | p(x_{n-1} | x_n)) = (SNR(n-1) - SNR(n)) |x0 - x0_hat(x_n, n)|^2 / 2
    L_0     = -log p(x0 | x_1)

The reverse variance is the posterior's ([DDPM] eq. 7), as in the ancestral sampler, for which the KL is the SNR form
([VDM] section 4.1). L_0 is the discretised Gaussian of [DDPM] eq. 13, of mean x0_hat(x_1, 1) and variance beta_1.
Images are on the grid of 256 levels; p is conditional on the caption.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEVELS = 256
Denoise = Callable[[Tensor, Tensor], Tensor]


def bits_per_dim(
    denoise: Denoise,
    alpha_bar: Float[Tensor, " steps"],
    x0: Float[Tensor, "B C H W"],
    *,
    strata: int,
    generator: torch.Generator,
) -> Float[Tensor, " B"]:
    """The bound, in the mean over the images: a row has `strata` of its image's N - 1 middle terms, weighted.

    Steps are evenly spaced in log n, as the terms fall about as 1 / n, and weighted for it. Image i takes one step in each of
    `strata` equal parts, at an offset that its place in the batch fixes: a row alone, always of the same steps, is no unbiased
    estimate of its image's bound. The mean over images in random order is one, as far as the sum over evenly spaced steps is
    that over all steps: with 1000 of them, terms of 1 / n, 128 images and 16 strata to 3e-5.

    Args:
        denoise: `(x_n, n: (B,) in 1..N) -> x0_hat`.
        alpha_bar: float64 table, one for each of the N steps.
        x0: in [-1, 1], on the grid of levels.
        strata: N - 1 or more takes every term, and the noise alone is random.
        generator: of the noise.
    """
    steps, batch = len(alpha_bar), len(x0)
    snr = alpha_bar / (1 - alpha_bar)
    last = alpha_bar[-1]
    total = 0.5 * (last * x0.double().square() - last - torch.log1p(-last)).sum((1, 2, 3))  # L_N
    total = total - _decoder_log_likelihood(x0, denoise(*_noised(x0, alpha_bar, _step(1, batch), generator)), alpha_bar)
    offset = (torch.arange(batch) + 0.5) / batch
    for k in range(min(strata, steps - 1)):
        if strata < steps - 1:
            n = 1 + (steps ** ((k + offset.double()) / strata)).long().clamp(max=steps - 1)
            weight = math.log(steps) / (n / (n - 1)).log() / strata  # over the chance of n: log(n / (n - 1)) / log N
        else:
            n, weight = _step(2 + k, batch), 1.0
        x0_hat = denoise(*_noised(x0, alpha_bar, n, generator))
        error = (x0 - x0_hat).double().square().sum((1, 2, 3))
        total = total + weight * 0.5 * (snr[n - 2] - snr[n - 1]) * error
    return total / (math.log(2) * x0[0].numel())


def _step(n: int, batch: int) -> Int[Tensor, " B"]:
    return torch.full((batch,), n)


def _noised(x0: Tensor, alpha_bar: Tensor, n: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_n ~ q(x_n | x0) ([DDPM] eq. 4), and n."""
    level = alpha_bar[n - 1].view(-1, 1, 1, 1)
    eps = torch.randn(x0.shape, generator=generator)
    return level.sqrt().float() * x0 + (1 - level).sqrt().float() * eps, n


def _decoder_log_likelihood(x0: Tensor, mean: Tensor, alpha_bar: Tensor) -> Float[Tensor, " B"]:
    """log of the Gaussian's mass in the level's bin; the end bins reach to infinity ([DDPM] eq. 13)."""
    std = (1 - alpha_bar[0]).sqrt()
    residual = (x0 - mean).double()
    half = 1 / (LEVELS - 1)
    above, below = (residual + half) / std, (residual - half) / std
    flip = residual > 0  # Phi is accurate in the lower tail alone: mirror what lies in the upper
    above, below = torch.where(flip, -below, above), torch.where(flip, -above, below)
    upper_end = torch.where(flip, x0 < -1 + half, x0 > 1 - half)
    lower_end = torch.where(flip, x0 > 1 - half, x0 < -1 + half)
    log_above = torch.where(upper_end, 0.0, torch.special.log_ndtr(above))
    log_below = torch.where(lower_end, -torch.inf, torch.special.log_ndtr(below))
    return (log_above + torch.log1p(-(log_below - log_above).exp())).sum((1, 2, 3))
