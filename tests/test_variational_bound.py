"""Bits per dimension: the bound written out with torch's distributions, and a Gaussian whose answer is known."""

import math

import pytest
import torch
from tiny import tiny_config, tiny_images, tiny_model
from torch.distributions import Normal, kl_divergence

from xdiffusion.data.image_set import to_uint8, to_unit_range
from xdiffusion.diffusion.schedules import BetaSchedule
from xdiffusion.evaluation.variational_bound import bits_per_dim
from xdiffusion.held_out import bound_scores

STEPS = 40
# as few steps of the same end: the bound needs nearly pure noise at the last
ALPHA_BAR = BetaSchedule(STEPS, beta_start=1e-3, beta_end=0.4).alpha_bar
STD = 0.3


def gaussian_denoiser(alpha_bar):
    """E[x0 | x_n] for pixels of N(0, STD^2)."""

    def denoise(xt, n):
        level = alpha_bar[n - 1].view(-1, 1, 1, 1).float()
        return level.sqrt() * STD**2 / (level * STD**2 + 1 - level) * xt

    return denoise


def gaussian_images(count, generator):
    return to_unit_range(to_uint8(STD * torch.randn(count, 1, 4, 4, generator=generator)))


def test_the_bound_of_ddpm_written_out(generator):
    """Every KL between two Normals with the posterior of [DDPM] eq. 6 and 7, the decoder of eq. 13, the same noise."""
    x0 = gaussian_images(3, generator)
    x0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # the ends of the range have bins of their own
    denoise = gaussian_denoiser(ALPHA_BAR)
    found = bits_per_dim(denoise, ALPHA_BAR, x0, strata=STEPS, generator=torch.Generator().manual_seed(1))

    x, noise = x0.double(), torch.Generator().manual_seed(1)
    alphas = ALPHA_BAR / torch.cat([torch.ones(1), ALPHA_BAR[:-1]])
    last = Normal(ALPHA_BAR[-1].sqrt() * x, (1 - ALPHA_BAR[-1]).sqrt())
    expected = kl_divergence(last, Normal(0.0, 1.0)).sum((1, 2, 3))
    for n in range(1, STEPS + 1):
        level, beta = ALPHA_BAR[n - 1], 1 - alphas[n - 1]
        xt = level.sqrt().float() * x0 + (1 - level).sqrt().float() * torch.randn(x0.shape, generator=noise)
        x0_hat = denoise(xt, torch.full((3,), n)).double()
        if n == 1:
            decoder = Normal(x0_hat, beta.sqrt())
            above, below = decoder.cdf(x + 1 / 255), decoder.cdf(x - 1 / 255)
            above, below = torch.where(x > 0.999, 1.0, above), torch.where(x < -0.999, 0.0, below)
            expected -= (above - below).clamp(1e-300).log().sum((1, 2, 3))
            continue
        before = ALPHA_BAR[n - 2]
        variance = (1 - before) / (1 - level) * beta

        def mean(x0, xt=xt, before=before, beta=beta, level=level, alpha=alphas[n - 1]):
            return (before.sqrt() * beta * x0 + alpha.sqrt() * (1 - before) * xt.double()) / (1 - level)

        expected += kl_divergence(Normal(mean(x), variance.sqrt()), Normal(mean(x0_hat), variance.sqrt())).sum((1, 2, 3))
    torch.testing.assert_close(found, expected / (16 * math.log(2)), rtol=1e-4, atol=1e-4)


def test_a_gaussian_with_its_optimal_denoiser(generator):
    """The expected terms in closed form."""
    table = BetaSchedule(1000).alpha_bar
    x0 = gaussian_images(64, generator)
    rows = bits_per_dim(gaussian_denoiser(table), table, x0, strata=1000, generator=generator)
    snr, error = table / (1 - table), STD**2 * (1 - table) / (STD**2 * table + 1 - table)
    middle = 0.5 * ((snr[:-1] - snr[1:]) * error[1:]).sum()
    prior = 0.5 * (table[-1] * STD**2 - table[-1] - torch.log1p(-table[-1]))
    # a bin much narrower than the decoder: its mass is density times width
    decoder = 0.5 * math.log(2 * math.pi * (1 - table[0])) + 0.5 * error[0] / (1 - table[0]) - math.log(2 / 255)
    expected = float((middle + prior + decoder) / math.log(2))
    assert float(rows.mean()) == pytest.approx(expected, abs=0.06)


def test_the_bound_is_above_the_entropy_and_near_it_where_steps_are_small(generator):
    table = torch.linspace(math.log(3e4), math.log(1e-4), 1000, dtype=torch.float64).sigmoid()
    rows = bits_per_dim(gaussian_denoiser(table), table, gaussian_images(64, generator), strata=1000, generator=generator)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2) - math.log2(2 / 255)
    assert entropy - 0.02 < float(rows.mean()) < entropy + 0.15


def test_few_strata_estimate_the_same(generator):
    x0 = gaussian_images(4000, generator)
    denoise = gaussian_denoiser(ALPHA_BAR)
    few, all_terms = (bits_per_dim(denoise, ALPHA_BAR, x0, strata=strata, generator=generator).mean() for strata in (4, STEPS))
    assert float(few) == pytest.approx(float(all_terms), rel=0.02)


def test_a_residual_far_in_the_tail_is_finite():
    x0 = torch.full((1, 1, 2, 2), 128 / 127.5 - 1)
    for wrong in (-1.0, 1.0):
        rows = bits_per_dim(lambda xt, n, w=wrong: w + 0 * xt, ALPHA_BAR, x0, strata=1, generator=torch.Generator())
        assert 100 < float(rows) < 1e6


def test_scores_of_models_with_and_without_a_bound():
    data = tiny_images()
    assert bound_scores(tiny_model(tiny_config()).eval(), data, 10, 0) == {"bits_per_dim": None}
    model = tiny_model(tiny_config("diffusion.schedule.kind=betas", "diffusion.prediction=eps")).eval()
    scores = bound_scores(model, data, 10, 0)
    low, high = scores["bits_per_dim_interval"]
    assert 0 < low < scores["bits_per_dim"] < high
    assert bound_scores(model, data, 10, 0) == scores
