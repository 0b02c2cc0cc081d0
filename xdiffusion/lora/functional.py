"""The LoRA maps: y = x (W + s B A)^T + b ([LoRA] eq. 3) and its convolution, by the cheapest of equal ways.

The plain formula runs x through A and through B beside W, and keeps x A^T for the backward pass. While there are many
more tokens than features it is cheaper to form W' = W + s B A, a matrix of W's size, once per call ([RunLoRA]):

    forward    y  = x W'^T + b
    backward   dx = g W',    dB = s g^T (x A^T),    dA = s (g B)^T x

which keeps x alone and differs by rounding only. With B = 0 it is bit-identical to the layer without LoRA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def lora_linear(
    x: Float[Tensor, "*B I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None,
    lora_A: Float[Tensor, "R I"],
    lora_B: Float[Tensor, "O R"],
    scaling: float,
) -> Float[Tensor, "*B O"]:
    """x (W + scaling B A)^T + b, through W' where that pays and the base is frozen, else by the plain formula."""
    trains_base = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if trains_base or not merging_pays(x, weight):
        return plain_lora_linear(x, x, weight, bias, lora_A, lora_B, scaling)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return _MergedLinear.apply(x.to(dtype), weight, bias, lora_A, lora_B, scaling)


def plain_lora_linear(
    x: Float[Tensor, "*B I"],
    branch_x: Float[Tensor, "*B I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None,
    lora_A: Float[Tensor, "R I"],
    lora_B: Float[Tensor, "O R"],
    scaling: float,
) -> Float[Tensor, "*B O"]:
    """x W^T + b + scaling (branch_x A^T) B^T; branch_x is x, or x after dropout."""
    branch = F.linear(F.linear(branch_x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * branch


def merging_pays(x: Float[Tensor, "*B I"], weight: Float[Tensor, "O I"]) -> bool:
    """Whether rank * I * O multiplications, for W', are fewer than tokens * rank * (I + O), for the low-rank branch."""
    out_features, in_features = weight.shape
    return x.numel() // in_features * (in_features + out_features) > in_features * out_features


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling B A of any kernel shape, computed in the factors' dtype and returned in W's."""
    flat = weight.flatten(1).to(lora_A.dtype)
    merged = torch.addmm(flat, lora_B.flatten(1), lora_A.flatten(1), alpha=scaling).to(weight.dtype).view(weight.shape)
    return merged if weight.is_contiguous() else torch.empty_like(weight).copy_(merged)  # keeps a channels_last layout


class _MergedLinear(torch.autograd.Function):
    """x has the dtype to compute in; W' is cast to it, and the factors' gradients come in the factors' dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling):
        with torch.autocast(x.device.type, enabled=False):
            merged = merged_weight(weight, lora_A, lora_B, scaling).to(x.dtype)
            ctx.save_for_backward(x, merged, lora_A, lora_B)
            ctx.scaling = scaling
            return F.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, merged, lora_A, lora_B = ctx.saved_tensors
        rows, grad_rows = (a.reshape(-1, a.shape[-1]) for a in (x, grad.to(x.dtype)))
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ merged).view_as(x)
        if ctx.needs_input_grad[3]:
            grad_A = ((grad_rows @ lora_B.to(x.dtype)).mul_(ctx.scaling).T @ rows).to(lora_A.dtype)
        if ctx.needs_input_grad[4]:
            grad_B = (grad_rows.T @ (rows @ lora_A.to(x.dtype).T).mul_(ctx.scaling)).to(lora_B.dtype)
        return grad_x, None, None, grad_A, grad_B, None
