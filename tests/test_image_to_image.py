"""Starting from data: which steps are left, what xt is there, and what a mask keeps through every sampler."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from commands import ROOT, SAMPLE

from xdiffusion.diffusion.schedules import CosineSchedule
from xdiffusion.samplers.ancestral import sample_ancestral
from xdiffusion.samplers.ddim import sample_ddim
from xdiffusion.samplers.dpm_solver import sample_dpm_solver
from xdiffusion.samplers.euler import sample_euler, sample_euler_ancestral
from xdiffusion.samplers.heun import sample_heun
from xdiffusion.samplers.image_to_image import MaskedDenoiser, StartImage, noised, steps_left, times_from
from xdiffusion.samplers.time_grids import uniform_times

SCHEDULE = CosineSchedule(-10, 10)
TIMES = uniform_times(SCHEDULE, 10)
MASK = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)


class HalfDenoiser:
    schedule = SCHEDULE

    def __call__(self, xt, t):
        return 0.5 * xt


@pytest.mark.parametrize(("strength", "steps"), [(0, 0), (0.1, 1), (0.3, 3), (0.77, 7), (1, 10)])
def test_strength_is_the_share_of_steps_that_are_left(strength, steps):
    times = times_from(TIMES, strength)
    assert len(times) == steps + 1
    assert torch.equal(times, TIMES[10 - steps :])


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_another_strength_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength=.* must be in \[0, 1\]"):
        times_from(TIMES, strength)


def test_the_usual_strength_is_the_one_that_the_command_says():
    help_of_flag = next(line for line in (ROOT / SAMPLE).read_text().splitlines() if '"--strength"' in line)
    assert f"1 = all ({StartImage(torch.zeros(1, 1, 4, 4)).strength})" in help_of_flag


def test_a_strength_that_leaves_no_step_is_refused():
    with pytest.raises(ValueError, match=r"strength=0.05 of 10 steps is less than one: take more steps, or at least 0.100"):
        times_from(TIMES, 0.05)


def test_the_strength_that_is_asked_for_leaves_one_step():
    for steps in [*range(1, 1100), 9999, 10_000, 10_001, 99_999]:
        with pytest.raises(ValueError, match=f"of {steps} steps is less than one") as refused:
            steps_left(steps, 0.5 / steps)
        assert steps_left(steps, float(str(refused.value).split()[-1])) == 1


def test_the_start_is_the_data_with_the_noise_of_its_time(generator):
    x0, eps = torch.randn(2, 2, 1, 1, 4, generator=generator)
    alpha, sigma = SCHEDULE.alpha_sigma(TIMES[4])
    assert torch.equal(noised(x0, eps, SCHEDULE, TIMES[4:]), alpha * x0 + sigma * eps)
    assert torch.equal(noised(x0, eps, SCHEDULE, TIMES[-1:]), x0)


@pytest.mark.parametrize("sampler", [sample_ddim, sample_euler, sample_heun, sample_dpm_solver])
def test_what_a_mask_keeps_passes_through_its_own_noisy_states(sampler, generator):
    """Exactly what blending after each step with the first noise would give."""
    x0, eps = torch.randn(2, 3, 1, 1, 4, generator=generator)
    xt, seen = noised(x0, eps, SCHEDULE, TIMES[2:]), []
    sampler(MaskedDenoiser(HalfDenoiser(), x0, MASK), xt, TIMES[2:], on_step=lambda i, xt, _: seen.append(xt))
    for t, x in zip(TIMES[3:], seen):
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        torch.testing.assert_close(x[..., 2:], (alpha * x0 + sigma * eps)[..., 2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", [sample_ancestral, sample_euler_ancestral])
def test_noisy_samplers_end_at_what_the_mask_keeps(sampler, generator):
    x0, eps = torch.randn(2, 3, 1, 1, 4, generator=generator)
    denoiser = MaskedDenoiser(HalfDenoiser(), x0, MASK)
    end = denoiser.kept(sampler(denoiser, noised(x0, eps, SCHEDULE, TIMES), TIMES, generator=generator))
    assert torch.equal(end[..., 2:], x0[..., 2:])
    assert not torch.isclose(end[..., :2], x0[..., :2], atol=0.01).any()


@pytest.mark.parametrize(("images", "mask", "said"), [((3, 8, 8), (3, 8, 8), "mask"), ((3, 8, 8), (1, 8, 4), "mask"),
                                                      ((1, 8, 8), (1, 8, 8), "start image")])  # fmt: skip
def test_images_and_masks_of_another_shape_are_refused(images, mask, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in use, where annotations are not looked at
    with pytest.raises(ValueError, match=f"the {said}"):
        StartImage(torch.zeros(1, *images), 0.5, torch.ones(1, *mask)).check((3, 8, 8), (4, 4, 4))


def test_a_grey_mask_keeps_or_draws_and_mixes_nothing():
    denoiser = MaskedDenoiser(HalfDenoiser(), torch.zeros(1, 1, 1, 4), torch.tensor([0.0, 0.5, 0.51, 1]).view(1, 1, 1, 4))
    assert denoiser.kept(torch.ones(1, 1, 1, 4)).flatten().tolist() == [0, 0, 1, 1]


def test_kept_pixels_are_those_of_the_image_from_two_latents_on(generator):
    """And as drawn where the latents are drawn anew; in between they pass over."""
    start, drawn = (torch.rand(1, 3, 24, 24, generator=generator) * 2 - 1 for _ in range(2))
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 4:12, 4:12] = 1
    given = StartImage(start, 0.5, mask)
    drawn = drawn.expand(2, -1, -1, -1)
    found = given.with_kept_pixels(drawn, (4, 6, 6))
    torch.testing.assert_close(found[..., 4:12, 4:12], drawn[..., 4:12, 4:12])
    own = torch.zeros(24, 24, dtype=torch.bool)
    own[20:] = True
    assert torch.equal(found[..., own], start.expand(2, -1, -1, -1)[..., own])
    share = (found - start)[0, 0] / (drawn - start)[0, 0]
    row = share[8, 11:]
    assert (row[0] == pytest.approx(1, abs=1e-4)) and (row.diff() <= 1e-4).all() and row[-1] == pytest.approx(0, abs=1e-4)
    assert torch.equal(replace(given, keep_pixels=False).with_kept_pixels(drawn, (4, 6, 6)), drawn)
    everywhere = StartImage(start, 0.5, torch.ones_like(mask)).with_kept_pixels(drawn, (4, 6, 6))
    torch.testing.assert_close(everywhere, drawn)  # up to the edges, behind which nothing is kept
    assert torch.equal(StartImage(start, 0.5).with_kept_pixels(drawn, (4, 6, 6)), drawn)
    assert torch.equal(given.with_kept_pixels(drawn, (3, 24, 24)), drawn)
