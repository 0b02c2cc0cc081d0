"""Every kind of layer that takes a LoRA, wrapped, and what it must compute."""

import copy

import pytest
import torch
from torch import nn

from xdiffusion.lora import apply_lora_to_model
from xdiffusion.lora.inject import lora_layers

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 9, 6)),
    "linear of few tokens": (lambda: nn.Linear(6, 5, bias=False), (1, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 8)),
    "conv1d strided": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2), (2, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "conv2d strided, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), padding=1), (2, 4, 8, 9)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (2, 4, 6, 6)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 6)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def wrapped(make, rank=3, alpha=2.0, dropout=0.0, random_b=True, **variant):
    """(base layer, model with the wrapped copy of it in `model.layer`)."""
    torch.manual_seed(0)
    base = make()
    model = nn.ModuleDict({"layer": copy.deepcopy(base)})
    apply_lora_to_model(model, rank, alpha, dropout, "all", **variant)
    if random_b:
        fill_b(model["layer"])
    return base, model


def fill_b(model):
    """Random lora_B in every adapter of a model, or of one layer."""
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for factor in layer.lora_B.values():
                factor.normal_(generator=torch.Generator().manual_seed(2))


def sample(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def with_weight(base, weight, x):
    """What a layer like `base` with another weight gives."""
    other = copy.deepcopy(base)
    other.weight = nn.Parameter(weight.detach())
    return other(x)


def product(layer, name="default"):
    """alpha / rank * B A, entry by entry."""
    lora_A, lora_B = layer.lora_A[name].detach(), layer.lora_B[name].detach()
    settings = layer.adapters[name]
    total = torch.zeros(layer.weight.shape)
    for r in range(settings.rank):
        total += torch.einsum("o,...->o...", lora_B[:, r].flatten(), lora_A[r])
    return settings.lora_alpha / settings.rank * total
