import pytest
import torch

from xdiffusion.diffusion.denoiser import Denoiser, GuidedDenoiser
from xdiffusion.diffusion.predictions import PREDICTIONS, training_target
from xdiffusion.diffusion.schedules import BetaSchedule, CosineSchedule

T = torch.tensor(0.4, dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_reads_a_perfect_network_as_x0(prediction, generator):
    x0, eps = (torch.randn(3, 1, 4, 4, generator=generator) for _ in range(2))
    alpha, sigma = CosineSchedule().alpha_sigma(T)
    target = training_target(prediction, x0, eps, alpha, sigma)
    denoiser = Denoiser(lambda xt, time, context: target, CosineSchedule(), prediction)
    torch.testing.assert_close(denoiser(alpha * x0 + sigma * eps, T, torch.zeros(3, 1, 1)), x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_a_network_says_in_half_precision_is_read_in_float32(prediction, generator):
    """As under autocast: its numbers are rounded, what is done with them is not."""
    xt, output = (torch.randn(3, 1, 4, 4, generator=generator) for _ in range(2))
    said, context = output.bfloat16(), torch.zeros(3, 1, 1)
    half, whole = (Denoiser(lambda *_, out=out: out, CosineSchedule(), prediction) for out in (said, said.float()))
    assert torch.equal(half(xt, T, context), whole(xt, T, context)) and half(xt, T, context).dtype == torch.float32


def test_network_sees_the_schedules_time_in_float32():
    seen = []

    def network(xt, time, context):
        seen.append(time)
        return xt

    for schedule in (CosineSchedule(), BetaSchedule()):
        Denoiser(network, schedule, "v")(torch.zeros(2, 1, 2, 2), T, torch.zeros(2, 1, 1))
    assert [s.tolist() for s in seen] == [[400.0, 400.0], [399.0, 399.0]]
    assert seen[0].dtype == torch.float32


def test_whole_steps_round_what_the_network_sees_and_not_the_noise_level():
    seen = []

    def network(xt, time, context):
        seen.append(time.tolist())
        return torch.zeros_like(xt)

    t, xt, context = torch.tensor(0.4006, dtype=torch.float64), torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 1)
    x0 = [Denoiser(network, BetaSchedule(), "eps", whole)(xt, t, context) for whole in (False, True)]
    assert seen == [[pytest.approx(399.6)], [400.0]]
    assert torch.equal(*x0)  # xt / alpha(t)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_times_of_their_own_are_each_samples_alone(scale, generator):
    xt, context = torch.randn(3, 1, 4, 4, generator=generator), torch.randn(3, 2, 5, generator=generator)
    network = lambda xt, time, c: xt * (time / 1000 + c.mean(dim=(1, 2))).view(-1, 1, 1, 1)  # noqa: E731
    denoiser, t = Denoiser(network, CosineSchedule(), "v"), torch.tensor([0.2, 0.5, 0.9])
    together = GuidedDenoiser(denoiser, context, context[:1], scale)(xt, t)
    alone = [GuidedDenoiser(denoiser, context[i : i + 1], context[:1], scale)(xt[i : i + 1], t[i]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_the_formula_on_two_separate_passes(scale, generator):
    xt = torch.randn(3, 1, 4, 4, generator=generator)
    context, null = torch.randn(3, 2, 5, generator=generator), torch.randn(1, 2, 5, generator=generator)
    network = lambda xt, time, c: torch.tanh(xt * c.mean(dim=(1, 2)).view(-1, 1, 1, 1))  # noqa: E731
    denoiser = Denoiser(network, CosineSchedule(), "v")
    cond, uncond = denoiser(xt, T, context), denoiser(xt, T, null.expand_as(context))
    guided = GuidedDenoiser(denoiser, context, null, scale)(xt, T)
    torch.testing.assert_close(guided, uncond + scale * (cond - uncond))


def test_guidance_in_x0_space_is_guidance_in_eps_space(generator):
    """cond and uncond share xt, and x0 is affine in eps there."""
    xt = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    eps = {c: torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64) for c in ("cond", "uncond")}
    alpha, sigma = CosineSchedule().alpha_sigma(T)
    x0 = {c: (xt - sigma * e) / alpha for c, e in eps.items()}
    guided_eps = eps["uncond"] + 3 * (eps["cond"] - eps["uncond"])
    torch.testing.assert_close(x0["uncond"] + 3 * (x0["cond"] - x0["uncond"]), (xt - sigma * guided_eps) / alpha)


def test_scale_one_runs_one_pass_and_clipping_clamps():
    batches = []

    def network(xt, time, context):
        batches.append(len(xt))
        return torch.full_like(xt, 9.0)

    denoiser = Denoiser(network, CosineSchedule(), "x0")
    context = torch.zeros(4, 1, 1)
    x0 = GuidedDenoiser(denoiser, context, context[:1], 1.0, clip_x0=True)(torch.zeros(4, 1, 2, 2), T)
    assert batches == [4]
    assert x0.max() == 1.0
    GuidedDenoiser(denoiser, context, context[:1], 2.0)(torch.zeros(4, 1, 2, 2), T)
    assert batches == [4, 8]
