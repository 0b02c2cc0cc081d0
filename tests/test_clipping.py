"""Gradients are clipped as torch clips them, bit for bit."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from xdiffusion.training.clipping import clip_gradients


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e9])
def test_clipping_is_torchs(max_norm):
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 3, 3), (1,)]
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    for a, b in zip(ours[:-1], theirs):  # the last has no gradient
        a.grad = torch.randn(a.shape)
        b.grad = a.grad.clone()
    before = [p.grad.clone() for p in ours[:-1]]
    norm = clip_gradients(Accelerator(cpu=True), ours, max_norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:-1], theirs))
    assert all(torch.equal(a.grad, b) for a, b in zip(ours[:-1], before)) == (max_norm > norm)
