import pytest
import torch
from tiny import tiny_config, tiny_trainer

from xdiffusion.diffusion.objective import draw_noise, draw_times, loss, min_snr_weight, squared_error
from xdiffusion.diffusion.predictions import PREDICTIONS, to_x0
from xdiffusion.diffusion.schedules import BetaSchedule, CosineSchedule
from xdiffusion.training import diffusion_task

CONTEXT = torch.zeros(6, 1, 2)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_loss_written_out(generator):
    """The same numbers step by step, with the draws replayed from an equal generator."""
    x0 = torch.randn(6, 1, 4, 4, generator=generator)
    schedule = BetaSchedule()
    network = lambda xt, time, context: 0.3 * xt + time.view(-1, 1, 1, 1) / 1000  # noqa: E731

    value = loss(network, schedule, "v", x0, CONTEXT, generator=generator_of(7))

    replay = generator_of(7)
    offset = torch.rand((), generator=replay)
    total = 0.0
    steps = [int(((offset + i / 6) % 1) * 1000) for i in range(6)]
    eps = torch.randn(x0.shape, generator=replay)
    for i, n in enumerate(steps):
        a, s = schedule.alpha_bar[n].sqrt().float(), (1 - schedule.alpha_bar[n]).sqrt().float()
        xt = a * x0[i] + s * eps[i]
        total += (0.3 * xt + n / 1000 - (a * eps[i] - s * x0[i])).square().mean() / 6
    torch.testing.assert_close(value, total)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss(prediction, generator):
    x0 = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    schedule, t = CosineSchedule(-8, 8), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in schedule.alpha_sigma(t))

    def perfect(xt, time, context):
        """Inverts xt -> prediction by solving for the output that decodes to x0."""
        zero, one = (to_x0(prediction, torch.full_like(xt, value), xt, alpha, sigma) for value in (0.0, 1.0))
        return (x0 - zero) / (one - zero)

    error = squared_error(perfect, schedule, prediction, x0, eps, t, CONTEXT)
    torch.testing.assert_close(error, torch.zeros_like(error), atol=1e-9, rtol=0)


def test_times_are_stratified(generator):
    t = draw_times(CosineSchedule(), 64, generator)
    counts = torch.histc(t, bins=64, min=0, max=1)
    assert torch.equal(counts, torch.ones(64))


@pytest.mark.parametrize("parts", [2, 3])
def test_a_divided_batch_draws_as_the_whole(parts, generator):
    x0 = torch.randn(6, 1, 4, 4, generator=generator)
    network = lambda xt, time, context: 0.3 * xt  # noqa: E731
    whole = loss(network, CosineSchedule(), "eps", x0, CONTEXT, generator=generator_of(3))
    shares = [
        loss(network, CosineSchedule(), "eps", x, c, generator=generator_of(3), share=(k, parts))
        for k, (x, c) in enumerate(zip(x0.chunk(parts), CONTEXT.chunk(parts)))
    ]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def test_min_snr_weight_equalises_the_predictions_in_x0_space():
    """weight * |error of the prediction| must be min(SNR, gamma) * |error of x0| for each of them."""
    schedule, t = CosineSchedule(), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    alpha, sigma = schedule.alpha_sigma(t)
    for prediction in PREDICTIONS:
        xt, output = torch.ones_like(t), torch.zeros_like(t)
        x0_error = to_x0(prediction, output + 1, xt, alpha, sigma) - to_x0(prediction, output, xt, alpha, sigma)
        weighted = min_snr_weight(logsnr, prediction, 5.0)
        torch.testing.assert_close(weighted, logsnr.exp().clamp(max=5.0) * x0_error**2)


def test_noise_is_standard_normal(generator):
    noise = draw_noise((1000, 1, 10, 10), generator)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_offset_noise_adds_one_number_to_each_channel():
    plain, offset = (draw_noise((500, 3, 4, 4), generator_of(1), strength) for strength in (0.0, 0.5))
    added = offset - plain
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    assert float(added[:, :, 0, 0].std()) == pytest.approx(0.5, rel=0.05)
    assert torch.allclose(added[:, :, 0, 0].T.corrcoef(), torch.eye(3), atol=0.15)  # each channel's is its own
    assert torch.equal(draw_noise((500, 3, 4, 4), generator_of(1)), plain)


def test_offset_noise_is_the_target_too(generator):
    """A network that knows the noise, offset included, has no eps loss."""
    x0 = torch.zeros(6, 1, 4, 4)
    schedule = CosineSchedule(-8, 8)

    def knows(xt, time, context):  # xt = sigma * eps
        sigma = torch.sigmoid(-logsnr).sqrt().view(-1, 1, 1, 1)
        return xt / sigma

    logsnr = schedule.logsnr(draw_times(schedule, 6, generator_of(2)))
    value = loss(knows, schedule, "eps", x0, CONTEXT, generator=generator_of(2), offset_noise=0.3)
    torch.testing.assert_close(value, torch.zeros(()), atol=1e-8, rtol=0)


def test_weights_weigh_the_samples(generator):
    x0 = torch.randn(6, 1, 4, 4, generator=generator)
    network = lambda xt, time, context: 0.3 * xt  # noqa: E731

    def value(weights=None, part=0, parts=1):
        own = slice(part * 6 // parts, (part + 1) * 6 // parts)
        given = {"generator": generator_of(3), "share": (part, parts)}
        return loss(network, CosineSchedule(), "v", x0[own], CONTEXT[own], weights=weights, **given)

    one = [value(6.0 * torch.nn.functional.one_hot(torch.tensor(i), 6)) for i in range(6)]
    torch.testing.assert_close(torch.stack(one).mean(), value())
    torch.testing.assert_close(value(torch.tensor([3.0, 3, 0, 0, 0, 0])), (one[0] + one[1]) / 2)
    assert torch.equal(value(torch.ones(6)), value())
    weights = torch.tensor([0.0, 0, 0, 1, 2, 3])  # of mean 1 over the batch, which its halves have not
    parts = [value(weights[3 * k : 3 * k + 3], k, 2) for k in range(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), value(weights))


def test_a_key_that_is_added_to_the_loss_reaches_it(monkeypatch):
    """As docs/architecture.md says how to add a weighting."""
    config = tiny_config("diffusion.offset_noise=0.1", "diffusion.min_snr_gamma=5")
    seen = {}
    monkeypatch.setattr(diffusion_task, "loss", lambda *_, **given: seen.update(given) or torch.zeros((), requires_grad=True))
    tiny_trainer(config).step(1)
    of_config = {key: value for key, value in config.diffusion.items() if key != "schedule"}
    assert of_config.items() <= seen.items() and {"prediction", "min_snr_gamma", "offset_noise"} <= of_config.keys()
