from inspect import unwrap

import pytest
import torch

from xdiffusion.diffusion.predictions import PREDICTIONS, eps_of_x0, to_x0, training_target


@pytest.fixture
def sample(generator):
    x0, eps = (torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    phi = torch.tensor([0.1, 0.6, 1.0, 1.5], dtype=torch.float64).view(4, 1, 1, 1)
    alpha, sigma = phi.cos(), phi.sin()
    return x0, eps, alpha, sigma, alpha * x0 + sigma * eps


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_back_x0_and_eps(prediction, sample):
    x0, eps, alpha, sigma, xt = sample
    target = training_target(prediction, x0, eps, alpha, sigma)
    estimate = to_x0(prediction, target, xt, alpha, sigma)
    torch.testing.assert_close(estimate, x0)
    torch.testing.assert_close(eps_of_x0(estimate, xt, alpha, sigma), eps)


def test_v_is_the_angular_velocity_of_xt(sample):
    """v = d xt / d phi along alpha = cos(phi), sigma = sin(phi): the derivative by autograd is the second way."""
    x0, eps, alpha, sigma, _ = sample
    phi = torch.atan2(sigma, alpha).requires_grad_()
    xt = phi.cos() * x0 + phi.sin() * eps
    velocity = torch.stack([torch.autograd.grad(x.sum(), phi, retain_graph=True)[0].sum() for x in xt.flatten(1).T[:5]])
    expected = training_target("v", x0, eps, alpha, sigma).flatten(1).sum(0)[:5]
    torch.testing.assert_close(velocity, expected)


@pytest.mark.parametrize("call", [training_target, to_x0])
def test_an_unknown_prediction_names_those_allowed(call, sample):
    x0, eps, alpha, sigma, _ = sample
    with pytest.raises(ValueError, match="'w' is unknown; allowed: eps, v, x0"):
        unwrap(call)("w", x0, eps, alpha, sigma)  # without the tests' own type check
