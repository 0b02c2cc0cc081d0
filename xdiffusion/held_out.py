"""A model's losses on held-out images: of fixed (image, noise, time) triples, by log-SNR, and as bits per dimension."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.data.image_set import ImageSet
from xdiffusion.diffusion.denoiser import Denoiser, GuidedDenoiser
from xdiffusion.diffusion.objective import squared_error
from xdiffusion.diffusion.schedules import BetaSchedule
from xdiffusion.evaluation.bootstrap import mean_interval
from xdiffusion.evaluation.gap import FixedDraws, fixed_draws, gap_closed
from xdiffusion.evaluation.loss_curve import LossCurve, in_eps_space, logsnr_at, loss_curve
from xdiffusion.evaluation.variational_bound import bits_per_dim
from xdiffusion.lora.adapters import lora_disabled
from xdiffusion.model import DiffusionModel

BLOCK = 128
CURVE_PAIRS = 1024
BOUND_IMAGES, BOUND_STRATA = 128, 16
WithoutLoRA = Callable[[DiffusionModel], AbstractContextManager]


def loss_gap(
    model: DiffusionModel, data: ImageSet, normal: ImageSet, without_lora: WithoutLoRA = lora_disabled
) -> float:
    """`gap_closed` of the model's LoRA on the held-out images of an inverted set and of its normal twin."""
    draws = fixed_draws(len(data.test), model.latent_shape)

    def mean_loss(images: ImageSet) -> float:
        return float(held_out_errors(model, images, draws).mean())

    lora_inverted = mean_loss(data)
    with without_lora(model):
        base_inverted, base = mean_loss(data), mean_loss(normal)
    return gap_closed(base, base_inverted, lora_inverted)


def loss_curves(
    model: DiffusionModel, data: ImageSet, normal: ImageSet, resamples: int, without_lora: WithoutLoRA | None
) -> dict[str, LossCurve]:
    """The held-out loss in eps space by log-SNR on fixed (image, noise, t) triples: of "model", and with a LoRA of "base".

    For an inverted set "base_on_normal" is the base on its own images, the floor of a LoRA.
    """
    draws = fixed_draws(len(data.test), model.latent_shape, CURVE_PAIRS)
    t = model.schedule.time_of_logsnr(logsnr_at(draws.t))
    alpha, sigma = model.schedule.alpha_sigma(t)

    def curve(images: ImageSet) -> LossCurve:
        errors = held_out_errors(model, images, draws._replace(t=t))
        return loss_curve(in_eps_space(errors, model.prediction, alpha, sigma), draws.t, resamples)

    curves = {"model": curve(data)}
    if without_lora is not None:
        with without_lora(model):
            curves["base"] = curve(data)
            if data.inverted:
                curves["base_on_normal"] = curve(normal)
    return curves


@torch.no_grad()
def held_out_errors(model: DiffusionModel, images: ImageSet, draws: FixedDraws) -> Float[Tensor, " N"]:
    """The squared error of each fixed draw, in the space that the network predicts, under its class's plainest caption."""
    captions = [images.prompts.captions[label][0] for label in images.test.labels[draws.index].tolist()]
    context = model.text_encoder.encode(captions)  # a LoRA may be in the text encoder too
    x0 = model.autoencoder.encode(images.test.floats(draws.index).to(model.device))
    blocks = zip(*(a.to(model.device).split(BLOCK) for a in (x0, draws.eps, draws.t, context)))
    errors = [squared_error(model.network, model.schedule, model.prediction, *block) for block in blocks]
    return torch.cat(errors).cpu()


@torch.no_grad()
def bound_scores(model: DiffusionModel, data: ImageSet, resamples: int, seed: int) -> dict[str, Any]:
    """Bits per dimension by the variational bound; None but for discrete steps in pixel space."""
    schedule = model.schedule
    if not isinstance(schedule, BetaSchedule) or model.autoencoder.pixels_per_latent != 1:
        return {"bits_per_dim": None}
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.test), generator=generator)[:BOUND_IMAGES]
    context = model.text_encoder.encode([data.prompts.captions[label][0] for label in data.test.labels[index].tolist()])

    denoiser = Denoiser(model.network, schedule, model.prediction)
    clipped = GuidedDenoiser(denoiser, context, context[:1], cfg_scale=1.0, clip_x0=True)

    def denoise(xt: Tensor, n: Tensor) -> Tensor:
        return clipped(xt.to(model.device), n.to(model.device) / schedule.num_timesteps).cpu()

    x0 = data.test.floats(index)
    rows = bits_per_dim(denoise, schedule.alpha_bar, x0, strata=BOUND_STRATA, generator=generator)
    scores: dict[str, Any] = {"bits_per_dim": float(rows.mean())}
    if resamples:
        scores["bits_per_dim_interval"] = mean_interval(rows, resamples=resamples, seed=seed)
    return scores
