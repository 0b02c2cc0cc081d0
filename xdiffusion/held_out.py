"""A model's losses on held-out images: of fixed (image, noise, time) triples, by log-SNR, and as bits per dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xdiffusion.data.image_set import ImageSet
from xdiffusion.diffusion.denoiser import Denoiser, GuidedDenoiser
from xdiffusion.diffusion.objective import squared_error
from xdiffusion.diffusion.schedules import BetaSchedule, Schedule
from xdiffusion.evaluation.bootstrap import Groups, mean_interval
from xdiffusion.evaluation.gap import FixedDraws, fixed_draws, gap_closed, gap_interval
from xdiffusion.evaluation.loss_curve import LOGSNR_MAX, LOGSNR_MIN, LossCurve, in_eps_space, logsnr_at, loss_curve
from xdiffusion.evaluation.variational_bound import bits_per_dim
from xdiffusion.lora.adapters import lora_disabled
from xdiffusion.model import DiffusionModel, at_a_time

BLOCK = 128
CURVE_PAIRS = 1024
BOUND_IMAGES, BOUND_STRATA = 128, 16
WithoutLoRA = Callable[[DiffusionModel], AbstractContextManager]
Pictures = Callable[[Int[Tensor, " b"]], tuple[Float[Tensor, "b C H W"], list[str]]]  # by index, with their captions


def held_out_of(images: ImageSet) -> Pictures:
    """The held-out images of a set, each under its class's plainest caption."""

    def pictures(index: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b C H W"], list[str]]:
        labels = images.test.labels[index].tolist()
        return images.test.floats(index), [images.prompts.captions[label][0] for label in labels]

    return pictures


def gap_scores(
    model: DiffusionModel,
    data: ImageSet,
    normal: ImageSet,
    resamples: int,
    seed: int,
    without_lora: WithoutLoRA = lora_disabled,
) -> dict[str, Any]:
    """`gap_closed` of the model's LoRA on the held-out images of an inverted set and of its normal twin."""
    draws = fixed_draws(len(data.test), model.latent_shape)

    def loss(images: ImageSet) -> Float[Tensor, " N"]:
        return errors_of(model, *encoded(model, held_out_of(images), draws.index), draws)

    lora_inverted = loss(data)
    with without_lora(model):
        base_inverted, base = loss(data), loss(normal)
    losses = base, base_inverted, lora_inverted
    scores: dict[str, Any] = {"gap_closed": gap_closed(*(float(of.mean()) for of in losses))}
    if resamples:
        drawn = {"resamples": resamples, "seed": seed}
        scores["gap_closed_interval"] = gap_interval(torch.stack(losses), data.test.groups[draws.index], **drawn)
    return scores


def loss_curves(
    model: DiffusionModel,
    pictures: Pictures,
    draws: FixedDraws,
    groups: Groups,
    resamples: int,
    normal: Pictures | None = None,
    without_lora: WithoutLoRA | None = None,
) -> dict[str, LossCurve]:
    """The loss in eps space by log-SNR on fixed (image, noise, t) triples: of "model", and with a LoRA of "base".

    Args:
        pictures: held out, if the curve is to say how well the model knows what it has not seen.
        draws: which of them and which noise; their t only spreads the log-SNRs.
        groups: of the draws; those of one picture, or of variants of one, depend on each other.
        resamples: of the intervals; 0 leaves them out.
        normal: the pictures that the base is made for, where a LoRA's are in another style: "base_on_normal" is its floor.
        without_lora: a block in which the LoRA is off; None where there is none.

    Raises:
        ValueError: if a loss is not finite.
    """
    span = logsnr_span(model.schedule)
    t = model.schedule.time_of_logsnr(logsnr_at(draws.t, span))
    alpha, sigma = model.schedule.alpha_sigma(t)

    def curve(x0: Float[Tensor, "N C H W"], captions: Sequence[str]) -> LossCurve:
        errors = errors_of(model, x0, captions, draws._replace(t=t))
        return loss_curve(in_eps_space(errors, model.prediction, alpha, sigma), draws.t, groups, span, resamples)

    own = encoded(model, pictures, draws.index)
    curves = {"model": curve(*own)}
    if without_lora is not None:
        with without_lora(model):
            curves["base"] = curve(*own)
            if normal is not None:
                curves["base_on_normal"] = curve(*encoded(model, normal, draws.index))
    return curves


def logsnr_span(schedule: Schedule) -> tuple[float, float]:
    """The largest and the smallest log-SNR of a curve: Stable Diffusion's table ends before LOGSNR_MIN."""
    first, last = schedule.logsnr(torch.tensor([1e-6, 1.0], dtype=torch.float64)).tolist()
    return min(first, LOGSNR_MAX), max(last, LOGSNR_MIN)


@torch.no_grad()
def encoded(model: DiffusionModel, pictures: Pictures, index: Int[Tensor, " N"]) -> tuple[Float[Tensor, "N C H W"], list[str]]:
    """What the network denoises of the indexed pictures, on the CPU, and their captions; each picture is encoded once."""
    different, place = index.unique(return_inverse=True)
    x0, captions = [], []
    for block in different.split(at_a_time(model, BLOCK)):
        images, of_block = pictures(block)
        x0.append(model.autoencoder.encode(images.to(model.device)).float().cpu())
        captions += of_block
    return torch.cat(x0)[place], [captions[i] for i in place.tolist()]


@torch.no_grad()
def errors_of(
    model: DiffusionModel, x0: Float[Tensor, "N C H W"], captions: Sequence[str], draws: FixedDraws
) -> Float[Tensor, " N"]:
    """The squared error of each fixed draw, in the space that the network predicts.

    Raises:
        ValueError: if one is not finite.
    """
    different = list(dict.fromkeys(captions))
    context = model.text_encoder.encode(different)  # a LoRA may be in the text encoder too
    rows = torch.tensor([different.index(caption) for caption in captions])
    blocks = zip(*(a.split(at_a_time(model, BLOCK)) for a in (x0, draws.eps, draws.t, rows)))
    errors = [
        squared_error(model.network, model.schedule, model.prediction, *(a.to(model.device) for a in (x, eps, t)), context[row])
        for x, eps, t, row in blocks
    ]
    errors = torch.cat(errors).cpu()
    if broken := int((~errors.isfinite()).sum()):
        raise ValueError(f"{broken} of this model's losses on {len(errors)} images and noises are not finite")
    return errors


@torch.no_grad()
def bound_scores(model: DiffusionModel, data: ImageSet, resamples: int, seed: int) -> dict[str, Any]:
    """Bits per dimension by the variational bound; None but for discrete steps in pixel space."""
    schedule = model.schedule
    if not isinstance(schedule, BetaSchedule) or model.autoencoder.pixels_per_latent != 1:
        return {"bits_per_dim": None}
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.test), generator=generator)[:BOUND_IMAGES]
    x0, captions = held_out_of(data)(index)
    context = model.text_encoder.encode(captions)

    denoiser = Denoiser(model.network, schedule, model.prediction)
    clipped = GuidedDenoiser(denoiser, context, context[:1], cfg_scale=1.0, clip_x0=True)

    def denoise(xt: Tensor, n: Tensor) -> Tensor:
        return clipped(xt.to(model.device), n.to(model.device) / schedule.num_timesteps).cpu()

    rows = bits_per_dim(denoise, schedule.alpha_bar, x0, strata=BOUND_STRATA, generator=generator)
    if not rows.isfinite().all():
        raise ValueError("the variational bound of this model is not finite")
    scores: dict[str, Any] = {"bits_per_dim": float(rows.mean())}
    if resamples:
        scores["bits_per_dim_interval"] = mean_interval(rows, data.test.groups[index], resamples=resamples, seed=seed)
    return scores
