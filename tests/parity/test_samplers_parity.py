"""Each sampler beside diffusers' scheduler of the same name: the same network, noise, beta table and timesteps."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from xdiffusion.diffusion.denoiser import Denoiser, GuidedDenoiser
from xdiffusion.diffusion.schedules import BetaSchedule
from xdiffusion.samplers.ancestral import sample_ancestral
from xdiffusion.samplers.ddim import sample_ddim
from xdiffusion.samplers.dpm_solver import sample_dpm_solver
from xdiffusion.samplers.euler import sample_euler, sample_euler_ancestral
from xdiffusion.samplers.heun import sample_heun
from xdiffusion.samplers.time_grids import karras_times, timestep_times

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = BetaSchedule(spacing="scaled_linear", beta_start=0.00085, beta_end=0.012)
STEPS = 20
CONTEXT = torch.zeros(2, 1, 1, dtype=torch.float64)


def network(xt, time, context=None):
    """Any smooth nonlinear function of (xt, time)."""
    time = torch.as_tensor(time).reshape(-1, 1, 1, 1) / 1000
    return torch.tanh(xt * (0.5 + time)) + 0.3 * torch.sin(3 * xt) * time


def noise():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ours(sampler, prediction, timesteps, **kwargs):
    times = torch.cat([(timesteps.double() + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    return sampler(bound(prediction), noise(), times, **kwargs)


def bound(prediction):
    # float64 all the way, so that the comparison sees the formulas and not the rounding
    denoiser = Denoiser(lambda xt, time, context: _Double(network(xt, time.double())), SCHEDULE, prediction)
    return GuidedDenoiser(denoiser, CONTEXT, CONTEXT[:1], 1.0)


class _Double:
    """A network output whose .float() keeps float64."""

    def __init__(self, value):
        self.value = value

    def float(self):
        return self.value


def theirs(scheduler, timesteps=None, **step_kwargs):
    x = noise() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(model_input, t), t, x, **step_kwargs).prev_sample
    return x


NAMES = {"eps": "epsilon", "v": "v_prediction"}


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(prediction, eta):
    scheduler = DDIMScheduler(
        **BETAS,
        prediction_type=NAMES[prediction],
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(STEPS)
    expected = theirs(scheduler, eta=eta, generator=torch.Generator().manual_seed(1))
    actual = ours(sample_ddim, prediction, scheduler.timesteps, eta=eta, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("variance", "name"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ancestral(prediction, variance, name):
    # "leading" ends at step 0, the one place where diffusers leaves the noise out as Ho et al. do
    scheduler = DDPMScheduler(
        **BETAS, prediction_type=NAMES[prediction], clip_sample=False, variance_type=name, timestep_spacing="leading"
    )
    scheduler.set_timesteps(STEPS)
    expected = theirs(scheduler, generator=torch.Generator().manual_seed(1))
    actual = ours(
        sample_ancestral, prediction, scheduler.timesteps, variance=variance, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_dpm_solver(prediction):
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, prediction_type=NAMES[prediction], algorithm_type="dpmsolver++", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(STEPS)
    torch.testing.assert_close(
        ours(sample_dpm_solver, prediction, scheduler.timesteps), theirs(scheduler), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_heun(prediction):
    scheduler = HeunDiscreteScheduler(**BETAS, prediction_type=NAMES[prediction], timestep_spacing="leading")
    scheduler.set_timesteps(STEPS)
    timesteps = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2]])  # each appears twice but the first
    expected = theirs(scheduler)
    actual = ours(sample_heun, prediction, timesteps)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", ["euler", "euler_ancestral"])
def test_euler(prediction, name):
    """ "leading" starts from unit variance; the noise comes from the same generator."""
    sampler, theirs_class = {
        "euler": (sample_euler, EulerDiscreteScheduler),
        "euler_ancestral": (sample_euler_ancestral, EulerAncestralDiscreteScheduler),
    }[name]
    scheduler = theirs_class(**BETAS, prediction_type=NAMES[prediction], timestep_spacing="leading")
    scheduler.set_timesteps(STEPS)
    expected = theirs(scheduler, generator=torch.Generator().manual_seed(1))
    actual = ours(sampler, prediction, scheduler.timesteps, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [7, 20, 50])
@pytest.mark.parametrize(
    ("scheduler_class", "theirs_spacing", "spacing"),
    [
        (DDIMScheduler, "leading", "leading"),
        (DDIMScheduler, "trailing", "trailing"),
        (EulerDiscreteScheduler, "leading", "leading"),
        (EulerDiscreteScheduler, "linspace", "linspace"),
        (EulerDiscreteScheduler, "trailing", "trailing"),
        (DPMSolverMultistepScheduler, "linspace", "half_open"),
    ],
)
def test_timesteps(scheduler_class, theirs_spacing, spacing, steps):
    scheduler = scheduler_class(**BETAS, timestep_spacing=theirs_spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    times = timestep_times(SCHEDULE, steps, spacing)
    assert times[-1] == 0
    torch.testing.assert_close(SCHEDULE.network_time(times[:-1]), scheduler.timesteps.double(), rtol=0, atol=1e-3)


def test_karras_levels():
    scheduler = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(STEPS)
    times = karras_times(SCHEDULE, STEPS)
    levels = (-0.5 * SCHEDULE.logsnr(times)).exp()
    torch.testing.assert_close(levels, scheduler.sigmas.double(), rtol=1e-4, atol=1e-6)
    assert torch.equal(SCHEDULE.network_time(times[:-1]).round(), scheduler.timesteps.double())
