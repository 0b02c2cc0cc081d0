"""W' formed once for several passes, which share its gradient: the work on weights alone is not done again for each pass.

The gradient of a factor is linear in that of W' ([LoRA] eq. 3: dA = s B^T dW', dB = s dW' A^T), so the passes' gradients of
W' are added up first and go on to the factors, or through DoRA's norm, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xdiffusion.lora.functional import holds_updates
from xdiffusion.lora.inject import lora_layers
from xdiffusion.lora.layers import LoRALayer

LARGEST_WEIGHT = 2**16  # beyond it the thin products of `functional` cost less than the gradient of W'


def layers_to_form(model: nn.Module) -> list[LoRALayer]:
    """The layers whose W' can stand for W and its adapters, and is small enough for its gradient to be cheap.

    It cannot with dropout, which is another in each pass, nor in a dtype that would not show the updates.
    """
    return [layer for _, layer in lora_layers(model) if layer.weight.numel() <= LARGEST_WEIGHT and _can_stand(layer)]


def _can_stand(layer: LoRALayer) -> bool:
    """Whether one W' serves all passes."""
    factors = [layer.lora_A[name] for name in layer.adapters]
    drops_out = any(settings.dropout for settings in layer.adapters.values())
    return bool(factors) and not drops_out and holds_updates(layer.weight, factors[0])


@contextmanager
def formed_once(layers: Sequence[LoRALayer]) -> Iterator[list[Tensor]]:
    """Within this block the layers compute with the W' of its beginning; at its end their gradients go on to what formed them.

    Yields:
        each W' that adapters are trained in, as a leaf whose `grad` the block has to set, or leave at None.
    """
    formed = {layer: weight for layer in layers if (weight := layer.effective_weight()).requires_grad}
    leaves = [weight.detach().requires_grad_() for weight in formed.values()]
    for layer, leaf in zip(formed, leaves):
        layer.keep_results(leaf)
    try:
        yield leaves
    finally:
        for layer in formed:
            layer.drop_results()
    reached = [(weight, leaf.grad) for weight, leaf in zip(formed.values(), leaves) if leaf.grad is not None]
    if reached:
        torch.autograd.backward(*zip(*reached))
