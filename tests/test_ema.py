"""The moving average of the weights against its recursion written out."""

import pytest
import torch
from torch import nn

from xdiffusion.training.ema import EMA


def walk(parameter, ema, steps):
    """A weight that is 1, 2, 3, ... after each step."""
    for step in range(1, steps + 1):
        parameter.data.fill_(step)
        ema.update(step)


@pytest.mark.parametrize("decay", [0.3, 0.5, 0.999])
def test_the_average_follows_its_recursion(decay):
    parameter = nn.Parameter(torch.zeros(2, 3))
    ema = EMA([parameter], decay)
    walk(parameter, ema, 30)
    expected = 0.0
    for step in range(1, 31):
        now = min(decay, (1 + step) / (10 + step))
        expected = now * expected + (1 - now) * step
    torch.testing.assert_close(ema.average[0], torch.full((2, 3), expected))


def test_early_on_the_average_forgets_the_start():
    parameter = nn.Parameter(torch.tensor(1e6))
    ema = EMA([parameter], 0.999)
    for step in range(1, 101):
        parameter.data.fill_(1.0)
        ema.update(step)
    assert ema.average[0] < 1.01  # 0.999^100 of a million would be 904,792


def test_without_decay_the_average_is_the_weights():
    parameter = nn.Parameter(torch.zeros(3))
    ema = EMA([parameter], 0.0)
    parameter.data.copy_(torch.tensor([0.1, 1 / 3, 1e-30]))
    ema.update(1)
    assert torch.equal(ema.average[0], parameter.data)


@pytest.mark.parametrize("fails", [False, True])
def test_in_place_shows_the_average_and_gives_the_weights_back(fails):
    layer = nn.Linear(2, 2)
    ema = EMA(list(layer.parameters()), 0.5)
    average = [a.clone() for a in ema.average]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    trained, storage = [p.detach().clone() for p in layer.parameters()], layer.weight.data_ptr()

    def inside():
        with ema.in_place():
            assert all(torch.equal(p, a) for p, a in zip(layer.parameters(), average))
            assert all(torch.equal(p, a) for p, a in zip(ema.trained(), trained))
            assert torch.equal(layer.state_dict()["weight"], average[0])
            if fails:
                raise OSError("disk full")

    if fails:
        with pytest.raises(OSError, match="disk full"):
            inside()
    else:
        inside()
    assert all(torch.equal(p, a) for p, a in zip(layer.parameters(), trained))
    assert all(torch.equal(p, a) for p, a in zip(ema.trained(), trained))
    assert layer.weight.data_ptr() == storage  # the optimizer's state stays with these tensors


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_bad_decay_is_named(decay):
    with pytest.raises(ValueError, match=rf"training.ema_decay={decay} must be in \[0, 1\)"):
        EMA([], decay)
