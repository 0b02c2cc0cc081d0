import math

import pytest
import torch

from xdiffusion.diffusion.schedules import BetaSchedule, CosineSchedule

SCHEDULES = {
    "cosine": CosineSchedule(),
    "linear": BetaSchedule(),
    "scaled_linear": BetaSchedule(spacing="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "beta_cosine": BetaSchedule(spacing="cosine"),
    "zero_snr": BetaSchedule(spacing="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True),
}
T = torch.linspace(0.001, 0.999, 997, dtype=torch.float64)


@pytest.fixture(params=SCHEDULES, ids=list(SCHEDULES))
def schedule(request):
    return SCHEDULES[request.param]


def test_variance_is_preserved(schedule):
    alpha, sigma = schedule.alpha_sigma(T)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(T))


def test_logsnr_is_that_of_the_coefficients_and_falls(schedule):
    alpha, sigma = schedule.alpha_sigma(T)
    logsnr = schedule.logsnr(T)
    torch.testing.assert_close(logsnr, (alpha**2 / sigma**2).log(), rtol=1e-9, atol=1e-9)
    coarse = schedule.logsnr(torch.linspace(0.001, 1, 1000, dtype=torch.float64))
    assert (coarse.diff() < 0).all()


def test_time_of_logsnr_inverts_logsnr(schedule):
    torch.testing.assert_close(schedule.time_of_logsnr(schedule.logsnr(T[1:])), T[1:], rtol=0, atol=2e-6)


def test_cosine_reaches_the_given_ends_and_is_a_cosine():
    schedule = CosineSchedule(logsnr_min=-12, logsnr_max=14)
    ends = schedule.logsnr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([14.0, -12.0], dtype=torch.float64))
    # far from the ends it is alpha = cos(pi t / 2), the form of the papers
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    torch.testing.assert_close(CosineSchedule(-30, 30).alpha_sigma(t)[0], (math.pi * t / 2).cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(CosineSchedule(-30, 2000).alpha_sigma(t)[0], (math.pi * t / 2).cos(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("spacing", "start", "end"), [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012), ("cosine", 1e-4, 0.02)]
)
def test_alpha_bar_is_the_product_of_one_minus_beta(spacing, start, end):
    schedule = BetaSchedule(num_timesteps=1000, spacing=spacing, beta_start=start, beta_end=end)
    product, direct = 1.0, []
    for n in range(1000):
        if spacing == "cosine":
            f = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (n, n + 1)]
            beta = min(1 - f[1] / f[0], 0.999)
        elif spacing == "linear":
            beta = start + (end - start) * n / 999
        else:
            beta = (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * n / 999) ** 2
        product *= 1 - beta
        direct.append(product)
    torch.testing.assert_close(schedule.alpha_bar, torch.tensor(direct, dtype=torch.float64), rtol=1e-9, atol=1e-15)


def test_beta_schedule_on_its_grid_points_in_float32():
    schedule = SCHEDULES["scaled_linear"]
    n = torch.arange(1, 1001)
    t = (n / 1000).float()
    alpha, _ = schedule.alpha_sigma(t)
    torch.testing.assert_close(alpha.double() ** 2, schedule.alpha_bar, rtol=2e-6, atol=1e-9)
    assert torch.equal(schedule.network_time(t), (n - 1).float())
    assert torch.equal(schedule.alpha_sigma(torch.zeros(1))[0], torch.ones(1))


def test_a_table_has_its_own_numbers_on_its_grid_points():
    """To the last digit of either dtype, and flat below the first, where no step has been taken yet."""
    schedule = SCHEDULES["scaled_linear"]
    t, level = torch.arange(1, 1001, dtype=torch.float64) / 1000, schedule.alpha_bar
    torch.testing.assert_close(schedule.logsnr(t), (level / (1 - level)).log(), rtol=1e-12, atol=1e-12)
    assert torch.equal(schedule.logsnr(t.float()), schedule.logsnr(t).float())
    below = torch.tensor([1e-9, 0.0004, 0.001], dtype=torch.float64)
    assert torch.equal(schedule.logsnr(below), schedule.logsnr(below[2:]).expand(3))
    assert schedule.network_time(below).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_times_in_half_precision_are_computed_with_in_float32(schedule, dtype):
    t = torch.tensor([0.1, 0.7, 0.9]).to(dtype)
    for found, expected in zip(
        (*schedule.alpha_sigma(t), schedule.logsnr(t), schedule.network_time(t)),
        (*schedule.alpha_sigma(t.float()), schedule.logsnr(t.float()), schedule.network_time(t.float())),
    ):
        assert torch.equal(found, expected) and found.dtype == torch.float32


def test_a_log_snr_beyond_the_ends_is_at_an_end(schedule):
    first = schedule.training_time(torch.zeros(1)).item()
    assert schedule.time_of_logsnr(torch.tensor([-200.0, 200.0])).tolist() == [1, pytest.approx(first)]
    clean = schedule.logsnr(torch.zeros(2))  # of a table it is infinite
    assert schedule.time_of_logsnr(clean).tolist() == [0, 0]


def test_the_table_is_copied_once_for_each_device_and_dtype():
    schedule, t = BetaSchedule(), torch.rand(5)
    assert schedule._table_for(t) is schedule._table_for(t + 1)
    assert schedule.logsnr(t).dtype == torch.float32 and schedule.logsnr(t.double()).dtype == torch.float64
    torch.testing.assert_close(schedule.logsnr(t.double()), BetaSchedule().logsnr(t.double()), rtol=0, atol=0)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step():
    plain, shifted = SCHEDULES["scaled_linear"], SCHEDULES["zero_snr"]
    assert shifted.alpha_bar[-1] < 1e-12
    torch.testing.assert_close(shifted.alpha_bar[0], plain.alpha_bar[0])
    # algorithm 1 of the paper on the square roots, written out
    root = plain.alpha_bar.sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(shifted.alpha_bar, expected**2)


def test_training_times_are_grid_points_and_cover_the_table():
    schedule = SCHEDULES["linear"]
    t = schedule.training_time(torch.linspace(0, 1, 100_001))
    n = schedule.network_time(t)
    assert torch.equal(n, n.round())
    assert n.min() == 0
    assert n.max() == 999 and t.max() == 1
    u = torch.rand(50)
    assert torch.equal(CosineSchedule().training_time(u), u)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineSchedule(3, -3), "logsnr_min=3"),
        (lambda: CosineSchedule(-30.1), r"logsnr_min=-30\.1 .* at least -30"),
        (lambda: BetaSchedule(num_timesteps=1), "num_timesteps=1"),
        (lambda: BetaSchedule(beta_start=0.5, beta_end=0.1), "beta_start=0.5"),
        (lambda: BetaSchedule(beta_end=1.0), "beta_end=1.0"),
    ],
)
def test_bad_arguments_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_noisiest_cosine_falls_to_its_end():
    logsnr = CosineSchedule(-30, 30).logsnr(torch.linspace(0, 1, 1001))
    assert logsnr[-1] == pytest.approx(-30, abs=1)  # in float32, whose next numbers are -29.3 and -30.9
    assert (logsnr.diff() < 0).all()
