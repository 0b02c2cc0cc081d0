"""The training objective: draw a time and a noise, make xt, and regress the network on its target.

    L = E_{t, eps} [ w(logsnr) * || network(xt, time, context) - target ||^2 ]          ([DDPM] eq. 14, [PD] appendix D)

The network is any callable `(xt, time, context) -> prediction`. Randomness comes from one explicit generator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.diffusion.predictions import Prediction, training_target
from xdiffusion.diffusion.schedules import Schedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss(
    network: Network,
    schedule: Schedule,
    prediction: Prediction,
    x0: Float[Tensor, "B C H W"],
    context: Float[Tensor, "B L D"],
    *,
    generator: torch.Generator,
    min_snr_gamma: float | None = None,
    offset_noise: float = 0.0,
    weights: Float[Tensor, " B"] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Float[Tensor, ""]:
    """The whole training step up to the scalar to differentiate.

    Args:
        x0: data in [-1, 1] (or latents of unit scale).
        context: text embeddings.
        generator: source of the times and of the noise.
        min_snr_gamma: clips the weight in x0 space at this SNR ([MinSNR]); None leaves the prediction's own weight.
        offset_noise: strength of a constant added to the noise of each channel, so that a picture's mean brightness is
            learned too ([OffsetNoise]); 0.05 to 0.1 is usual.
        weights: of the samples, with mean 1 over the batch; None is 1 for each.
        share: (k, n) where x0 is the k-th of n equal parts of a batch (accumulation, processes): times and noise are
            drawn for the whole batch, so that they do not depend on how it is divided.

    Returns:
        The mean over the batch of the weighted squared error.
    """
    part, parts = share
    rows = slice(part * x0.shape[0], (part + 1) * x0.shape[0])
    t = draw_times(schedule, parts * x0.shape[0], generator)[rows].to(x0.device)
    eps = draw_noise((parts * x0.shape[0], *x0.shape[1:]), generator, offset_noise)[rows].to(x0.device)
    error = squared_error(network, schedule, prediction, x0, eps, t, context)
    if min_snr_gamma is not None:
        error = error * min_snr_weight(schedule.logsnr(t), prediction, min_snr_gamma)
    return error.mean() if weights is None else (weights * error).mean()


def squared_error(
    network: Network,
    schedule: Schedule,
    prediction: Prediction,
    x0: Float[Tensor, "B C H W"],
    eps: Float[Tensor, "B C H W"],
    t: Float[Tensor, " B"],
    context: Float[Tensor, "B L D"],
) -> Float[Tensor, " B"]:
    """Mean squared error of each sample at a given noise and time; the fixed-noise losses of evaluation use it too."""
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in schedule.alpha_sigma(t))
    xt = alpha * x0 + sigma * eps
    target = training_target(prediction, x0, eps, alpha, sigma)
    output = network(xt, schedule.network_time(t), context)
    return (output.float() - target).square().mean(dim=(1, 2, 3))


def draw_times(schedule: Schedule, batch: int, generator: torch.Generator) -> Float[Tensor, " B"]:
    """Stratified training times: one uniform offset shared by B equally spaced points ([VDM] appendix I.1)."""
    offset = torch.rand((), generator=generator, device=generator.device)
    strata = torch.arange(batch, device=generator.device) / batch
    return schedule.training_time((offset + strata) % 1)


def draw_noise(shape: tuple[int, ...], generator: torch.Generator, offset_noise: float = 0.0) -> Float[Tensor, "B C H W"]:
    """Standard normal noise in float32 on the generator's device, plus offset_noise times one number per channel."""
    eps = torch.randn(shape, generator=generator, device=generator.device)
    if offset_noise:
        eps = eps + offset_noise * torch.randn((*shape[:2], 1, 1), generator=generator, device=generator.device)
    return eps


def min_snr_weight(logsnr: Float[Tensor, " B"], prediction: Prediction, gamma: float) -> Float[Tensor, " B"]:
    """min(SNR, gamma) in x0 space, divided by the weight which the prediction already has there ([MinSNR] section 3.4).

    An eps loss weighs the x0 error by SNR, a v loss by SNR + 1, an x0 loss by 1.
    """
    snr = logsnr.exp()
    own_weight = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=gamma) / own_weight
