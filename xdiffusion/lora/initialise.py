"""How the factors of a new adapter begin.

zero_b       A as nn.Linear draws its weights, B = 0: the update is zero, and only B has a gradient ([LoRA] section 4.1)
pissa        s B A = the `rank` largest singular triples of W, the part of W that says most ([PiSSA] eq. 2-3)
orthogonal   random A and B, neither zero, in orthogonal halves of the rank, so that B A = 0 up to rounding
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from xdiffusion.lora.settings import Init, LoRAError


@torch.no_grad()
def initial_factors(weight: Tensor, rank: int, scaling: float, init: Init) -> tuple[Tensor, Tensor]:
    """A (rank, in, *kernel) and B (out, rank, *ones), float32, on the weight's device.

    Args:
        weight: W, (out, in, *kernel).
        rank: see `check_settings`.
        scaling: s, what B A will be multiplied by.
        init: see above.

    Raises:
        LoRAError: for a scaling of zero or below with "pissa", and for another init.
    """
    as_factors = {"dtype": torch.float32, "device": weight.device}
    if init == "zero_b":
        lora_A = torch.empty(rank, *weight.shape[1:], **as_factors)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        lora_B = torch.zeros(len(weight), rank, **as_factors)
    elif init == "pissa":
        lora_A, lora_B = _principal(weight, rank, scaling)
    elif init == "orthogonal":
        lora_A, lora_B = _orthogonal(weight, rank)
    else:
        raise LoRAError(f"init={init!r} has no factors here")
    ones = [1] * (weight.dim() - 2)
    return lora_A.reshape(rank, *weight.shape[1:]).contiguous(), lora_B.reshape(-1, rank, *ones).contiguous()


def _principal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A = sqrt(S) V^T / sqrt(s), B = U sqrt(S) / sqrt(s) of the first `rank` singular triples."""
    if scaling <= 0:
        raise LoRAError(f"init='pissa' needs a lora_alpha above 0, not one that scales by {scaling:g}")
    left, values, right = torch.linalg.svd(weight.flatten(1).float(), full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _orthogonal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A from the even rows of an orthogonal (rank, rank) matrix, B from its odd ones; the factor 1/10 is peft's."""
    out_size, in_size = weight.flatten(1).shape
    draw = partial(torch.randn, dtype=torch.float32, device=weight.device)
    rows, _ = torch.linalg.qr(draw(rank, rank))
    half = rank // 2
    lora_A = (draw(in_size, half) @ rows[0::2] / 10).T
    return lora_A, draw(out_size, half) @ rows[1::2] / 10
