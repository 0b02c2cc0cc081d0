"""The LoRA maps: y = x (W + s B A)^T + b ([LoRA] eq. 3) and its convolution, by the cheapest of equal ways.

The plain formula runs x through A and through B beside W, and keeps x A^T for the backward pass. While there are many
more positions than features it is cheaper to form W' = W + s B A, a matrix of W's size, once per call ([RunLoRA]):

    forward    y  = x W'^T + b
    backward   dx = g W',    dB = s g^T (x A^T),    dA = s (g B)^T x

which keeps x alone (W' is formed again) and differs by rounding only. For up to SMALL_PRODUCT multiplications the gradient of
W' itself, g^T x, is one product that costs little more than these four thin ones, and automatic differentiation does it all
without coming back to Python, which the threads of a step would wait for. A W in half precision beside factors in float32
takes the plain formula (`holds_updates`). With B = 0 every way is bit-identical to the layer without LoRA. In a
convolution x A^T is the convolution of x with A, and the last product its weight gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SMALL_PRODUCT = 2**26  # positions * in * out
Product = tuple[Tensor, Tensor, float]  # A, B and what their product is multiplied by


class Geometry(NamedTuple):
    """How a convolution walks over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def lora_linear(
    x: Float[Tensor, "*B I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None,
    lora_A: Float[Tensor, "R I"],
    lora_B: Float[Tensor, "O R"],
    scaling: float,
) -> Float[Tensor, "*B O"]:
    """x (W + scaling B A)^T + b, through W' where that pays and the base is frozen, else by the plain formula."""
    if not holds_updates(weight, lora_A):
        x = x.to(_dtype_to_compute_in(x))  # once for W and A
        return plain_lora_linear(x, x, weight, bias, lora_A, lora_B, scaling)
    if _is_traced() or _trains(weight, bias) or not merging_pays(x.numel() // x.shape[-1], weight):
        return plain_lora_linear(x, x, weight, bias, lora_A, lora_B, scaling)
    if x.numel() * len(weight) <= SMALL_PRODUCT:
        return F.linear(x, merged_weight(weight, lora_A, lora_B, scaling), bias)
    return _MergedLinear.apply(x.to(_dtype_to_compute_in(x)), weight, bias, lora_A, lora_B, scaling)


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


def lora_conv(
    x: Float[Tensor, "B I *size"],
    weight: Float[Tensor, "O I *kernel"],
    bias: Float[Tensor, " O"] | None,
    lora_A: Float[Tensor, "R I *kernel"],
    lora_B: Float[Tensor, "O R *ones"],
    scaling: float,
    geometry: Geometry,
    convolve: Callable[..., Tensor] | None = None,
) -> Float[Tensor, "B O *out_size"]:
    """The convolution of x with W + scaling B A, plus b, by the way that `lora_linear` would go.

    convolve: the base layer's own way to convolve, with F.conv2d's arguments; None for torch's.
    """
    if not holds_updates(weight, lora_A):
        x = x.to(_dtype_to_compute_in(x))
        return plain_lora_conv(x, x, weight, bias, lora_A, lora_B, scaling, geometry, convolve)
    # convolutions reorder their weight on every call: measured, W' pays from about four times the positions on
    least_positions = 4 * math.prod(geometry.stride)
    if _is_traced() or _trains(weight, bias) or not merging_pays(x[:, 0].numel() // least_positions, weight):
        return plain_lora_conv(x, x, weight, bias, lora_A, lora_B, scaling, geometry, convolve)
    return _MergedConv.apply(x.to(_dtype_to_compute_in(x)), weight, bias, lora_A, lora_B, scaling, geometry)


def plain_lora_conv(
    x: Float[Tensor, "B I *size"],
    branch_x: Float[Tensor, "B I *size"],
    weight: Float[Tensor, "O I *kernel"],
    bias: Float[Tensor, " O"] | None,
    lora_A: Float[Tensor, "R I *kernel"],
    lora_B: Float[Tensor, "O R *ones"],
    scaling: float,
    geometry: Geometry,
    convolve: Callable[..., Tensor] | None = None,
) -> Float[Tensor, "B O *out_size"]:
    """conv(x, W) + b + scaling conv(conv(branch_x, A), B); branch_x is x, or x after dropout."""
    of_torch = _convolution_of(weight)
    branch = of_torch(of_torch(branch_x, lora_A.to(x.dtype), None, *geometry), lora_B.to(x.dtype))
    return (convolve or of_torch)(x, weight, bias, *geometry) + scaling * branch


def joined(products: Sequence[Product]) -> Product:
    """One product that is the sum of several: the ranks side by side."""
    if len(products) == 1:
        return products[0]
    lora_A = torch.cat([lora_A for lora_A, _, _ in products])
    return lora_A, torch.cat([strength * lora_B for _, lora_B, strength in products], dim=1), 1.0


def holds_updates(weight: Tensor, lora_A: Tensor) -> bool:
    """Whether W' in W's dtype shows what the factors add.

    A W in half precision lies on that dtype's numbers: where the update is less than half a last place, W' rounded to them is
    W. A float32 W does not, and rounding W' keeps the update on average.
    """
    return weight.dtype == lora_A.dtype or torch.promote_types(weight.dtype, lora_A.dtype) == weight.dtype


def merging_pays(positions: int, weight: Float[Tensor, "O *I"]) -> bool:
    """Whether rank * I * O multiplications, for W', are fewer than positions * rank * (I + O), for the branch."""
    out_features, in_features = len(weight), weight[0].numel()
    return positions * (in_features + out_features) > in_features * out_features


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling B A of any kernel shape, computed in the finer dtype of W and the factors, in W's dtype and layout."""
    with _without_autocast(weight.device.type):
        if weight.dim() == 2 and weight.dtype == lora_A.dtype:  # the usual case, without a call that does nothing
            return in_layout_of(weight, torch.addmm(weight, lora_B, lora_A, alpha=scaling))
        own, channels_last = weight, _lies_channels_last(weight)
        if channels_last:  # contiguous where the channels are moved to the end
            weight, lora_A = weight.movedim(1, -1), lora_A.movedim(1, -1)
        finer = torch.promote_types(weight.dtype, lora_A.dtype)
        flat, lora_A, lora_B = (tensor.flatten(1).to(finer) for tensor in (weight, lora_A, lora_B))
        merged = torch.addmm(flat, lora_B, lora_A, alpha=scaling)
    merged = merged.to(weight.dtype).view(weight.shape)
    return in_layout_of(own, merged.movedim(-1, 1) if channels_last else merged)


def in_layout_of(weight: Tensor, other: Tensor) -> Tensor:
    """Values of a weight's shape in its memory layout, by which torch chooses kernels, and the last bits are decided."""
    return other if other.stride() == weight.stride() else torch.empty_like(weight, dtype=other.dtype).copy_(other)


def _lies_channels_last(weight: Tensor) -> bool:
    """Whether a weight's strides are not the contiguous ones; they decide the layout of a convolution's output.

    Of one input channel, or a kernel of one pixel, `is_contiguous` says yes to both layouts.
    """
    return weight.stride(1) != weight.shape[2:].numel() or weight.stride(-1) != 1


def dora_weight(
    weight: Float[Tensor, "O *I"],
    base: Float[Tensor, "O *I"],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Float[Tensor, " O"],
) -> Float[Tensor, "O *I"]:
    """magnitude * (weight + scaling B A) / |base + scaling B A|, the norm per output, all float32 ([DoRA] eq. 5).

    `weight` is W, or W with the adapters before this one in it; `base` is W. The norm is a constant in the backward pass
    ([DoRA] section 4.3), which costs no quality. An output whose norm is zero stays zero.
    """
    with torch.no_grad():
        norm = row_norms(merged_weight(base, lora_A, lora_B, scaling)).clamp_min(torch.finfo(base.dtype).tiny)
    factor = (magnitude / norm).view(-1, *[1] * (weight.dim() - 1))
    return factor * merged_weight(weight, lora_A, lora_B, scaling)


def row_norms(weight: Float[Tensor, "O *I"]) -> Float[Tensor, " O"]:
    """|W| of each output, over inputs and kernel."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())))


def _trains(weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _dtype_to_compute_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    casts = _autocasts(device) and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(device) if casts else x.dtype


def _is_traced() -> bool:
    """Whether the call is written down: for other sizes, for a program without our Functions, or for torch's compiler.

    The compiler fuses the plain formula by itself. Tracing into a Function whose backward pass turns autocast off, that of
    torch 2.14 believes it to be off in all that follows.
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # it has none; dynamo of torch 2.6 cannot ask torch.amp


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


class _MergedLinear(torch.autograd.Function):
    """x has the dtype to compute in; W' is cast to it, and the factors' gradients come in the factors' dtype.

    The backward pass forms W' again: kept, it would be a copy of every weight, and no gradient of it (a gradient penalty, a
    Hessian) would reach the factors.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, lora_A, lora_B, scaling):
        with _without_autocast(x.device.type):
            merged = merged_weight(weight, lora_A, lora_B, scaling).to(x.dtype)
            return F.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, lora_A, lora_B, ctx.scaling = inputs
        ctx.save_for_backward(x, weight, lora_A, lora_B)

    @staticmethod
    def backward(ctx, grad):
        x, weight, lora_A, lora_B = ctx.saved_tensors
        rows, grad_rows = (a.reshape(-1, a.shape[-1]) for a in (x, grad.to(x.dtype)))
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ merged_weight(weight, lora_A, lora_B, ctx.scaling).to(x.dtype)).view_as(x)
        if ctx.needs_input_grad[3]:
            grad_A = ((grad_rows @ (ctx.scaling * lora_B).to(x.dtype)).T @ rows).to(lora_A.dtype)
        if ctx.needs_input_grad[4]:
            # as (R, O): a third faster than g^T (x A^T), whose long dimension lies across the memory of both
            transposed = (rows @ (ctx.scaling * lora_A).to(x.dtype).T).T @ grad_rows
            grad_B = transposed.T.to(lora_B.dtype).contiguous()
        return grad_x, None, None, grad_A, grad_B, None


class _MergedConv(torch.autograd.Function):
    """As `_MergedLinear`: x has the dtype to compute in, the gradients of the factors have theirs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, lora_A, lora_B, scaling, geometry):
        with _without_autocast(x.device.type):
            merged = merged_weight(weight, lora_A, lora_B, scaling).to(x.dtype)
            return _convolution_of(weight)(x, merged, None if bias is None else bias.to(x.dtype), *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, lora_A, lora_B, ctx.scaling, ctx.geometry = inputs
        ctx.save_for_backward(x, weight, lora_A, lora_B)

    @staticmethod
    def backward(ctx, grad):
        x, weight, lora_A, lora_B = ctx.saved_tensors
        grad, down, up = grad.to(x.dtype), lora_A.to(x.dtype), lora_B.to(x.dtype).flatten(1)
        grad_rows = grad.movedim(1, -1).flatten(0, -2)  # (positions, O)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            merged = merged_weight(weight, lora_A, lora_B, ctx.scaling).to(x.dtype)
            grad_x = _conv_gradient(grad, x, merged, ctx.geometry, of_input=True)
        if ctx.needs_input_grad[3]:
            grad_low = (grad_rows @ up).mul_(ctx.scaling).view(len(x), *grad.shape[2:], -1).movedim(-1, 1)
            grad_A = _conv_gradient(grad_low, x, down, ctx.geometry, of_input=False).to(lora_A.dtype)
        if ctx.needs_input_grad[4]:
            low = _convolution_of(weight)(x, down, None, *ctx.geometry).movedim(1, -1).flatten(0, -2)  # (positions, R)
            grad_B = (grad_rows.T @ low).mul_(ctx.scaling).view_as(lora_B).to(lora_B.dtype)
        return grad_x, None, None, grad_A, grad_B, None, None


def _convolution_of(weight: Tensor) -> Callable[..., Tensor]:
    return F.conv2d if weight.dim() == 4 else F.conv1d


def _conv_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, of_input: bool) -> Tensor:
    """The gradient of conv(x, weight) with respect to x, or to the weight."""
    unpadded_output = [0] * len(geometry.stride)
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, False, unpadded_output, 1, [of_input, not of_input, False]
    )
    return gradients[0 if of_input else 1]
