"""The loss by log-SNR: one value whatever the network predicts, and bins that hold what they say."""

import math

import pytest
import torch
from tiny import tiny_config, tiny_images, tiny_model

from xdiffusion.data.image_set import invert
from xdiffusion.diffusion.predictions import PREDICTIONS, eps_of_x0, to_x0
from xdiffusion.diffusion.schedules import BetaSchedule, CosineSchedule
from xdiffusion.evaluation.gap import fixed_draws
from xdiffusion.evaluation.loss_curve import LOGSNR_MAX, LOGSNR_MIN, in_eps_space, logsnr_at, loss_curve
from xdiffusion.held_out import held_out_of, logsnr_span, loss_curves
from xdiffusion.lora import apply_lora_to_model
from xdiffusion.lora.adapters import lora_disabled


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_errors_of_the_output_are_those_of_its_eps(prediction, generator):
    alpha, sigma = CosineSchedule().alpha_sigma(torch.linspace(0.1, 0.9, 6, dtype=torch.float64))
    a, s = alpha.view(-1, 1), sigma.view(-1, 1)
    x0, eps, output = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    xt = a * x0 + s * eps
    target = {"eps": eps, "v": a * eps - s * x0, "x0": x0}[prediction]
    eps_hat = eps_of_x0(to_x0(prediction, output, xt, a, s), xt, a, s)
    found = in_eps_space((output - target).square().mean(1).float(), prediction, alpha.float(), sigma.float())
    torch.testing.assert_close(found.double(), (eps - eps_hat).square().mean(1), rtol=1e-4, atol=1e-5)


def test_bins_are_even_in_logsnr():
    u = (torch.arange(64) + 0.5) / 64
    curve = loss_curve(logsnr_at(u), u)  # the error is the log-SNR: a bin's mean is its centre
    assert curve.loss == pytest.approx(curve.logsnr, abs=1e-4)
    assert curve.logsnr == sorted(curve.logsnr, reverse=True)
    assert len(curve.logsnr) == 16
    assert curve.logsnr[0] - curve.logsnr[1] == pytest.approx((LOGSNR_MAX - LOGSNR_MIN) / 16)
    assert (curve.low, curve.high) == ([], [])
    assert len(loss_curve(torch.ones(3), (torch.arange(3) + 0.5) / 3).loss) == 3  # never an empty bin


def test_intervals_hold_their_means(generator):
    u = (torch.arange(320) + 0.5) / 320
    one = torch.zeros(320, dtype=torch.long)  # all depend on each other: no spread can be told
    assert loss_curve(torch.rand(320, generator=generator), u, one, resamples=50).low == []
    curve = loss_curve(torch.rand(320, generator=generator), u, resamples=50)
    assert all(low < mean < high for low, mean, high in zip(curve.low, curve.loss, curve.high))


@pytest.mark.parametrize("schedule", ["cosine", "betas"])
def test_curves_of_a_model_by_hand(schedule):
    """Of a LoRA that does nothing all are the base's; a value is the mean of its bin's errors of eps."""
    config = tiny_config(f"diffusion.schedule.kind={schedule}")
    model, data = tiny_model(config).eval(), tiny_images(test=32)
    apply_lora_to_model(model.network, 2, 4.0, 0.0, "all")
    draws = fixed_draws(32, model.latent_shape, 1024)
    curves = loss_curves(model, held_out_of(invert(data)), draws, draws.index, 0, held_out_of(data), lora_disabled)
    assert curves.keys() == {"model", "base", "base_on_normal"}
    assert curves["model"].loss == pytest.approx(curves["base"].loss, rel=1e-5)
    assert curves["model"].loss != pytest.approx(curves["base_on_normal"].loss, rel=1e-2)

    (first,) = (draws.t < 1 / 32).nonzero().flatten().tolist()
    second = int(((draws.t > 1 / 32) & (draws.t < 2 / 32)).nonzero())
    errors = []
    for i in (first, second):
        x0 = data.test.floats(draws.index[i : i + 1])
        t = model.schedule.time_of_logsnr(logsnr_at(draws.t[i : i + 1]))
        alpha, sigma = (c.view(1, 1, 1, 1) for c in model.schedule.alpha_sigma(t))
        assert float((alpha**2 / sigma**2).log()) == pytest.approx(float(logsnr_at(draws.t)[i]), abs=1e-2)
        xt = alpha * x0 + sigma * draws.eps[i]
        context = model.text_encoder.encode([data.prompts.captions[int(data.test.labels[draws.index[i]])][0]])
        with torch.no_grad():
            v = model.network(xt, model.schedule.network_time(t), context)
        errors.append(float((alpha * v + sigma * xt - draws.eps[i]).square().mean()))
    assert curves["base_on_normal"].loss[0] == pytest.approx(sum(errors) / 2, rel=1e-3)
    assert isinstance(model.schedule, BetaSchedule) == (schedule == "betas")


def test_a_curve_ends_where_its_schedule_does():
    assert logsnr_span(CosineSchedule()) == (LOGSNR_MAX, LOGSNR_MIN)
    sd = BetaSchedule(1000, "scaled_linear", 0.00085, 0.012)
    first, last = logsnr_span(sd)
    last_alpha_bar = float(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double().square().neg().log1p().sum().exp())
    ends = [math.log(alpha_bar / (1 - alpha_bar)) for alpha_bar in (1 - 0.00085, last_alpha_bar)]
    assert (first, last) == pytest.approx(ends, abs=1e-3)
    u = torch.tensor([0.01, 0.5, 0.99])
    alpha, sigma = sd.alpha_sigma(sd.time_of_logsnr(logsnr_at(u, (first, last))))
    torch.testing.assert_close((alpha**2 / sigma**2).log(), logsnr_at(u, (first, last)), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("part", ["network", "text_encoder"])
def test_losses_that_are_not_finite_are_an_error(part):
    model, data = tiny_model(tiny_config()).eval(), tiny_images(test=32)
    next(getattr(model, part).parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="32 of this model's losses on 32 images and noises are not finite"):
        draws = fixed_draws(32, model.latent_shape)
        loss_curves(model, held_out_of(data), draws, draws.index, 0)
