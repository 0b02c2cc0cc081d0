"""Clipping of gradients by their common norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xdiffusion.training.packed_weights import ROW
from xdiffusion.training.sharded_weights import is_sharded, local


@torch.no_grad()
def clip_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm of max_norm if they are above it; returns their norm before, after unscaling (fp16).

    As torch.nn.utils.clip_grad_norm_, but for a pass over gradients that need none; of sharded gradients it is the norm of
    all processes' rows.
    """
    accelerator.unscale_gradients()
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = list(map(local, found))
    norm = torch.linalg.vector_norm(torch.cat([_norms(gradient) for gradient in gradients]))
    if any(map(is_sharded, found)):
        square = norm.square()
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        torch._foreach_mul_(gradients, factor)
    return norm


def _norms(gradient: Tensor) -> Tensor:
    """The norm of each row of a buffer, else of the whole: over a million values float32's sum is off by 3e-5."""
    in_rows = gradient.dim() == 1 and gradient.numel() % ROW == 0
    return torch.linalg.vector_norm(gradient.view(-1, ROW) if in_rows else gradient.flatten()[None], dim=1)
