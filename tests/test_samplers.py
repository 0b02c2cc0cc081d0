"""Samplers against a case with a closed form: for Gaussian data the denoiser is known exactly.

For x0 ~ N(m, s^2) the posterior mean is x0(xt) = m + alpha s^2 / v (xt - alpha m) with v = alpha^2 s^2 + sigma^2, and the
probability-flow ODE carries x_T to x_0 = m + s / sqrt(v_T) (x_T - alpha_T m).
"""

import math
from inspect import unwrap

import pytest
import torch

from xdiffusion.diffusion.schedules import BetaSchedule, CosineSchedule
from xdiffusion.samplers.ancestral import sample_ancestral
from xdiffusion.samplers.contract import fresh_noise
from xdiffusion.samplers.ddim import sample_ddim
from xdiffusion.samplers.dpm_solver import sample_dpm_solver
from xdiffusion.samplers.euler import sample_euler, sample_euler_ancestral
from xdiffusion.samplers.heun import sample_heun
from xdiffusion.samplers.time_grids import karras_times, logsnr_times, timestep_times, uniform_times

MEAN, STD = 0.4, 0.25
SCHEDULE = CosineSchedule(-10, 10)


SAMPLERS = [sample_ddim, sample_heun, sample_dpm_solver, sample_ancestral, sample_euler, sample_euler_ancestral]


class GaussianDenoiser:
    def __init__(self, schedule=SCHEDULE):
        self.schedule = schedule
        self.calls = 0

    def __call__(self, xt, t):
        self.calls += 1
        alpha, sigma = self.schedule.alpha_sigma(t)
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (xt - alpha * MEAN)


def exact_end(x_T, schedule=SCHEDULE):
    alpha, sigma = schedule.alpha_sigma(torch.tensor([1.0, 0.0], dtype=torch.float64))
    std = (alpha**2 * STD**2 + sigma**2).sqrt()
    return alpha[1] * MEAN + std[1] / std[0] * (x_T - alpha[0] * MEAN)


def start(n=64):
    return torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("sampler", "order"), [(sample_ddim, 1), (sample_euler, 1), (sample_heun, 2), (sample_dpm_solver, 2)])
def test_order_of_convergence(sampler, order):
    """Halving the step divides the error by 2^order. Times evenly spaced in log-SNR, where all three are regular.

    The closing step to t = 0 is exact here up to sigma(0), so the order seen is that of the method.
    """
    errors = []
    for steps in (40, 80, 160):
        logsnr = torch.linspace(-10, 10, steps + 1, dtype=torch.float64)
        times = SCHEDULE.time_of_logsnr(logsnr)
        x_T = start()
        errors.append((sampler(GaussianDenoiser(), x_T, times) - exact_end(x_T)).abs().max())
    observed = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(o - order) < 0.25 for o in observed), observed
    assert errors[-1] < (2e-2 if order == 1 else 5e-4)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ancestral_reaches_the_distribution_that_its_recursion_predicts(variance):
    """Each step is affine in xt plus noise, so mean and variance after n steps follow by hand, and tend to the data's."""
    x_T = torch.randn(40_000, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for steps, tolerance in ((10, None), (200, 0.02)):
        times = uniform_times(SCHEDULE, steps)
        mean, var = 0.0, 1.0
        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
            (a_t, s_t), (a_s, s_s) = SCHEDULE.alpha_sigma(t), SCHEDULE.alpha_sigma(s)
            gain = a_t * STD**2 / (a_t**2 * STD**2 + s_t**2)  # x0 = MEAN + gain (xt - a_t MEAN)
            beta = 1 - (a_t / a_s) ** 2
            on_x0, on_xt = a_s * beta / s_t**2, a_t / a_s * s_s**2 / s_t**2
            mean = on_x0 * (MEAN + gain * (mean - a_t * MEAN)) + on_xt * mean
            var = (on_x0 * gain + on_xt) ** 2 * var
            if i < steps - 1:
                var = var + (beta if variance == "beta" else beta * s_s**2 / s_t**2)
        x = sample_ancestral(GaussianDenoiser(), x_T, times, variance=variance, generator=torch.Generator().manual_seed(2))
        assert abs(x.mean() - mean) < 5 * var**0.5 / 200
        assert abs(x.var() / var - 1) < 0.05
        if tolerance:
            assert abs(mean - MEAN) < tolerance
            assert abs(var**0.5 - STD) < tolerance


def test_ddim_with_full_eta_is_ancestral():
    times, x_T = uniform_times(SCHEDULE, 12), start()
    noises = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours = sample_ddim(GaussianDenoiser(), x_T, times, eta=1.0, generator=noises[0])
    # the same steps; DDIM also adds its (tiny) last noise, at sigma(0)
    theirs = sample_ancestral(GaussianDenoiser(), x_T, times, generator=noises[1])
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


def test_euler_is_ddim_in_other_coordinates():
    times, x_T = uniform_times(SCHEDULE, 12), start()
    torch.testing.assert_close(
        sample_euler(GaussianDenoiser(), x_T, times), sample_ddim(GaussianDenoiser(), x_T, times), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("sampler", [sample_ddim, sample_euler, sample_euler_ancestral, sample_heun])
def test_a_step_from_pure_noise_loses_no_digits(sampler):
    """At zero terminal SNR y = xt / alpha is huge, and x0 must not be added to it."""
    schedule = BetaSchedule(spacing="scaled_linear", zero_terminal_snr=True)
    x0 = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)

    def denoiser(xt, t):
        return x0

    denoiser.schedule = schedule
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    end = sampler(denoiser, noise, torch.tensor([1.0, 0.0]), generator=torch.Generator())
    torch.testing.assert_close(end, x0, rtol=0, atol=1e-6)


def test_euler_ancestral_reaches_the_distribution_that_its_recursion_predicts():
    """As above, in y = xt / alpha: y' = y + (down - s) (y - x0) / s + up * noise, with x0 affine in y."""
    x_T = torch.randn(40_000, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for steps, tolerance in ((10, None), (200, 0.02)):
        times = uniform_times(SCHEDULE, steps)
        alphas, sigmas = SCHEDULE.alpha_sigma(times)
        levels = sigmas / alphas
        mean, var = 0.0, 1 / alphas[0] ** 2
        for s, s_next in zip(levels[:-1], levels[1:]):
            up_squared = s_next**2 * (s**2 - s_next**2) / s**2
            shrink = (s_next**2 - up_squared).sqrt() / s  # y' = shrink y + (1 - shrink) x0
            gain = STD**2 / (STD**2 + s**2)  # x0 = MEAN + gain (y - MEAN)
            on_y = shrink + (1 - shrink) * gain
            mean, var = on_y * mean + (1 - on_y) * MEAN, on_y**2 * var + up_squared
        x = sample_euler_ancestral(GaussianDenoiser(), x_T, times, generator=torch.Generator().manual_seed(2))
        x = x / alphas[-1]
        assert abs(x.mean() - mean) < 5 * var**0.5 / 200
        assert abs(x.var() / var - 1) < 0.05
        if tolerance:
            assert abs(mean - MEAN) < tolerance
            assert abs(var**0.5 - STD) < tolerance


def test_samples_do_not_depend_on_their_batch():
    x_T, times = start(4), uniform_times(SCHEDULE, 5)

    def sample(rows):
        generators = [torch.Generator().manual_seed(i) for i in rows]
        return sample_ancestral(GaussianDenoiser(), x_T[rows], times, generator=generators)

    whole = sample([0, 1, 2, 3])
    assert torch.equal(whole[2:], sample([2, 3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_noise_is_of_the_dtype_of_what_it_is_added_to(dtype):
    generator = torch.Generator().manual_seed(0)
    for given in (generator, [generator] * 2):
        assert fresh_noise(torch.zeros(2, 1, 4, 4, dtype=dtype), given).dtype == dtype


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_reported_and_counted(sampler):
    denoiser, seen = GaussianDenoiser(), []
    sampler(
        denoiser,
        start(2),
        uniform_times(SCHEDULE, 6),
        generator=torch.Generator(),
        on_step=lambda i, xt, x0: seen.append(i),
    )
    assert seen == list(range(6))
    assert denoiser.calls == (11 if sampler is sample_heun else 6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_keeps_no_graph(sampler):
    """A network's parameters want gradients; a graph through all steps would hold the memory of each."""
    x_T = start(2).requires_grad_()
    assert not sampler(GaussianDenoiser(), x_T, uniform_times(SCHEDULE, 3), generator=torch.Generator()).requires_grad


def test_beta_tables_end_in_clean_data_without_nan():
    schedule = BetaSchedule()
    for sampler in (sample_ddim, sample_heun, sample_dpm_solver, sample_euler):
        x = sampler(GaussianDenoiser(schedule), start(), uniform_times(schedule, 100))
        assert x.isfinite().all()
        torch.testing.assert_close(x, exact_end(start(), schedule), atol=0.05, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (BetaSchedule(3000), 22),
        (BetaSchedule(4000), 22),
        (BetaSchedule(beta_end=0.06), 43),
        (CosineSchedule(-15, 40), 6),
    ],
    ids=["3000 steps", "4000 steps", "strong betas", "logsnr 40"],
)
def test_flat_parts_of_a_schedule_take_no_root_below_zero(sampler, schedule, steps):
    more = {"eta": 1.0} if sampler is sample_ddim and schedule.logsnr(torch.tensor(0.0)) < math.inf else {}
    times = uniform_times(schedule, steps)
    x = sampler(GaussianDenoiser(schedule), start().float(), times, generator=torch.Generator().manual_seed(1), **more)
    assert x.isfinite().all()
    assert abs(x.mean() - MEAN) < 3 * STD / 8


@pytest.mark.parametrize("grid", [uniform_times, logsnr_times, karras_times])
@pytest.mark.parametrize("schedule", [SCHEDULE, BetaSchedule()], ids=["cosine", "betas"])
def test_grids_fall_from_noise_to_data(grid, schedule):
    times = grid(schedule, 15)
    assert times.dtype == torch.float64
    assert len(times) == 16
    assert (times.diff() < 0).all()
    assert times[-1] == 0
    assert times[0] <= 1


def test_grids_start_where_they_are_told():
    assert uniform_times(SCHEDULE, 4, t_max=0.8).tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    times = logsnr_times(SCHEDULE, 3, t_max=0.8, logsnr_max=2)
    (start,), end = SCHEDULE.logsnr(times[:1]).tolist(), SCHEDULE.logsnr(torch.tensor(0.8, dtype=torch.float64)).item()
    assert times[0] == pytest.approx(0.8) and start == pytest.approx(end)
    assert SCHEDULE.logsnr(times[1:3]).tolist() == pytest.approx([(end + 2) / 2, 2])
    assert SCHEDULE.logsnr(logsnr_times(SCHEDULE, 3, logsnr_min=-3)[:1]).tolist() == pytest.approx([-3])
    wide = CosineSchedule(-15, 15)
    assert wide.logsnr(logsnr_times(wide, 3)[:3]).tolist() == pytest.approx([-10, 0, 10], abs=1e-9)


def test_karras_grid_is_even_in_its_power():
    levels = (-0.5 * SCHEDULE.logsnr(karras_times(SCHEDULE, 9, sigma_max=20, sigma_min=0.05, rho=7)[:-1])).exp()
    steps = (levels ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(8))


def test_karras_levels_stay_inside_the_table():
    table = BetaSchedule(spacing="scaled_linear", beta_start=0.00085, beta_end=0.012)  # Stable Diffusion's
    times = karras_times(table, 9)
    levels = (-0.5 * table.logsnr(times[:-1])).exp()
    assert (times.diff() < 0).all()
    assert times[[0, -2]].tolist() == pytest.approx([1, 1 / 1000])
    assert levels[[0, -1]].tolist() == pytest.approx([14.6146, 0.02917], rel=1e-3)


TABLES = {
    "linear": BetaSchedule(),
    "stable diffusion": BetaSchedule(spacing="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "pure noise at its end": BetaSchedule(zero_terminal_snr=True),
    "cosine": BetaSchedule(spacing="cosine"),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("steps", [2, 10, 100, 400])
def test_even_log_snr_stays_inside_the_table_and_is_followed_to_the_end(table, steps):
    times = logsnr_times(table, steps)
    assert (times.diff() < 0).all() and times[-1] == 0
    gaps = table.logsnr(times[:-1]).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), rtol=1e-2, atol=1e-3)
    x = sample_dpm_solver(GaussianDenoiser(table), start(), times)
    torch.testing.assert_close(x, exact_end(start(), table), atol=0.02 if steps >= 100 else 1.0, rtol=0)


def test_two_times_of_one_noise_level_are_no_obstacle():
    """More steps than a table has levels: below its first one it is flat."""
    table = BetaSchedule(num_timesteps=10)
    x = sample_dpm_solver(GaussianDenoiser(table), start(), uniform_times(table, 50))
    torch.testing.assert_close(
        x, sample_dpm_solver(GaussianDenoiser(table), start(), uniform_times(table, 10)), atol=0.3, rtol=0
    )


def test_timesteps_of_stable_diffusion():
    table = BetaSchedule(spacing="scaled_linear")
    leading = timestep_times(table, 4, "leading", last="first") * 1000 - 1
    assert leading.tolist() == pytest.approx([751, 501, 251, 1, 0])
    assert (timestep_times(table, 4) * 1000).tolist() == pytest.approx([1000, 750, 501, 251, 0])
    assert (timestep_times(table, 4, "linspace") * 1000 - 1).tolist() == pytest.approx([999, 666, 333, 0, -1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unwrap(timestep_times)(SCHEDULE, 5), "for tables of timesteps .*another is uniform"),
        (lambda: unwrap(timestep_times)(BetaSchedule(), 5, "even"), "'even' is unknown; allowed: leading, linspace"),
        (lambda: unwrap(timestep_times)(BetaSchedule(), 5, last="none"), "'none' is unknown; allowed: clean, first"),
        (lambda: timestep_times(BetaSchedule(), 2000), "steps=2000 .* do not fall"),
        (lambda: timestep_times(BetaSchedule(), 5, "leading", steps_offset=300), "steps_offset=300 .* do not fall"),
        (lambda: timestep_times(BetaSchedule(), 5, "linspace", last="first"), "last=first do not fall"),
        (lambda: sample_euler_ancestral(GaussianDenoiser(), start(), uniform_times(SCHEDULE, 3)), "generator"),
        (lambda: uniform_times(SCHEDULE, 0), "steps=0"),
        (lambda: uniform_times(SCHEDULE, 5, t_max=0.0), "t_max=0.0 must be above 0"),
        (lambda: logsnr_times(BetaSchedule(), 5, t_max=0.001), "logsnr_max=10.0 must be above 9.21, where t_max=0.001"),
        (lambda: sample_ddim(GaussianDenoiser(), start(), uniform_times(SCHEDULE, 3), eta=1.0), "generator"),
        (
            lambda: unwrap(sample_ancestral)(None, None, [], variance="big"),
            "'big' is unknown; allowed: posterior, beta",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
