"""conv3x3 against F.conv2d on both sides of its rule, and with a LoRA around it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xdiffusion.layers.convolution import Conv3x3, conv3x3
from xdiffusion.lora import apply_lora_to_model, lora_disabled, merge_lora_weights, unmerge_lora_weights


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 40, 4, 5), (2, 8, 9, 6)], ids=["few pixels", "many pixels"])
def test_it_is_the_convolution_and_its_gradients(shape, stride, layout):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(30, shape[1], 3, 3, dtype=torch.double).contiguous(memory_format=layout).requires_grad_()
    bias = torch.randn(30, dtype=torch.double, requires_grad=True)
    geometry = ((stride, stride), (1, 1), (1, 1))
    actual, expected = conv3x3(x, weight, bias, *geometry), F.conv2d(x, weight, bias, *geometry)
    assert actual.shape == expected.shape and torch.allclose(actual, expected)
    grad = torch.randn_like(expected)
    for a, e in zip(*(torch.autograd.grad(y, (x, weight, bias), grad) for y in (actual, expected))):
        assert torch.allclose(a, e)


def test_few_pixels_go_through_one_product_and_keep_the_layout(monkeypatch):
    layer = Conv3x3(40, 30).to(memory_format=torch.channels_last)
    x = torch.randn(1, 40, 4, 5).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(F, "conv2d", None)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(TypeError):
        layer(torch.randn(8, 40, 4, 5))


def test_a_lora_around_it_convolves_as_it_does():
    torch.manual_seed(0)
    plain = nn.Sequential(Conv3x3(40, 30))
    model = copy.deepcopy(plain)
    apply_lora_to_model(model, rank=2, target_modules="all")
    x = torch.randn(1, 40, 4, 5)
    expected = plain(x)
    assert torch.equal(model(x), expected)  # B = 0
    dropping = apply_lora_to_model(copy.deepcopy(plain), rank=2, dropout=0.5, target_modules="all").train()
    assert torch.equal(dropping(x), expected)
    with torch.no_grad():
        model[0].lora_B["default"].normal_()
    changed = model(x)
    assert not torch.allclose(changed, expected)
    with lora_disabled(model):
        assert torch.equal(model(x), expected)
    merge_lora_weights(model)
    assert type(model[0]) is Conv3x3 and torch.allclose(model(x), changed, atol=1e-4)
    unmerge_lora_weights(model)
    assert torch.equal(model(x), changed)
    assert type(copy.deepcopy(model)[0]) is type(model[0])
