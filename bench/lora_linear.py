"""Forward and backward of one LoRA linear layer beside peft's: seconds, peak memory and what is kept for backward.

    python bench/lora_linear.py
    python bench/lora_linear.py --shape 4096x640x640x8 --json

Ours is `xdiffusion.lora.LoRALinear`, theirs peft's `lora.Linear`; on both sides the base weight and bias are frozen, x
requires a gradient, there is no dropout, alpha = rank, the weights, x and the incoming gradient are the same float32
tensors, and B is random. The gradients of x, A and B are computed; the largest difference between the sides is printed.
The output is consumed by a function that keeps nothing, as a residual addition does, so it is freed before backward.

A second comparison is with the better of two smaller libraries: loralib's Linear, and the way of minLoRA, W + s B A as a
parametrization of the weight (minLoRA itself is on no package registry, so its formula is written out here).

Peak: what torch's allocator holds at the worst moment of forward + backward beyond x, the incoming gradient and the
weights. Saved: bytes that autograd keeps from forward to backward beyond x and the layer's parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from measure import Goal, Report, interleave, parser, peak_allocated, prepare, timer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from xdiffusion.cli import positive_int, run
from xdiffusion.lora import LoRALinear

Shape = tuple[int, int, int, int]  # tokens, in, out, rank
GOALS = {
    (16384, 128, 128, 4): Goal(0.65),
    (8192, 320, 320, 4): Goal(0.75),
    (8192, 768, 768, 16): Goal(0.90),
}
PEAK_GOAL = Goal(0.40)
SMALL_LIBRARY_GOALS = dict(zip(GOALS, (Goal(1.0), Goal(0.92), Goal(0.92))))


class _Consumer(torch.autograd.Function):
    """The rest of a network: takes the output, keeps nothing, and answers with a given gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


def layers(shape: Shape, device: torch.device) -> dict[str, nn.Module]:
    """Our layer and peft's, with the same base and the same factors."""
    from peft import LoraConfig, inject_adapter_in_model

    _, width_in, width_out, rank = shape
    torch.manual_seed(0)
    ours = LoRALinear(width_in, width_out, rank=rank, alpha=rank)
    nn.init.normal_(ours.lora_B["default"], std=0.1)
    base = nn.Linear(width_in, width_out)
    base.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    theirs = inject_adapter_in_model(config, nn.Sequential(base))[0]
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A["default"].data)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B["default"].data)
    for layer in (ours, theirs):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return {"ours": ours.to(device), "theirs": theirs.to(device)}


class _Parametrization(nn.Module):
    """W -> W + s B A, as minLoRA has it."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())
        self.scaling = scaling

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.lora_B @ self.lora_A).view(weight.shape) * self.scaling


def small_libraries(ours: LoRALinear) -> dict[str, nn.Module]:
    """loralib's layer and minLoRA's way, with the same base and the same factors as `ours`."""
    import loralib

    lora_A, lora_B, settings = ours.lora_A["default"].data, ours.lora_B["default"].data, ours.adapters["default"]
    of_loralib = loralib.Linear(
        ours.in_features, ours.out_features, r=settings.rank, lora_alpha=settings.rank, merge_weights=False
    )
    of_loralib.load_state_dict({"weight": ours.weight, "bias": ours.bias, "lora_A": lora_A, "lora_B": lora_B})
    of_minlora = nn.Linear(ours.in_features, ours.out_features)
    of_minlora.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    parametrize.register_parametrization(of_minlora, "weight", _Parametrization(lora_A, lora_B, settings.scaling))
    libraries = {"loralib": of_loralib, "minlora": of_minlora}
    for layer in libraries.values():
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in name)
        layer.to(ours.weight.device)
    return libraries


def forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """One pass that leaves fresh gradients on x, A and B."""
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def both_ways() -> None:
        for tensor in trained:
            tensor.grad = None
        _Consumer.apply(layer(x), grad).backward()

    return both_ways


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of x, A and B."""
    forward_backward(layer, x, grad)()
    with torch.no_grad():
        output = layer(x)
    return [output, x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def largest_difference(both: dict[str, nn.Module], x: Tensor, grad: Tensor) -> float:
    """The largest of max |ours - theirs| / max |theirs| over output and gradients."""
    ours, theirs = (gradients(layer, x, grad) for layer in both.values())
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs))


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps beyond those of x and the layer's parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    del output
    return sum(kept.values())


def shape_of(text: str) -> Shape:
    """An argparse type: tokens x in x out x rank."""
    parts = text.split("x")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} must be tokens x in x out x rank, such as 8192x320x320x4")
    return tuple(positive_int(part) for part in parts)


def measure(shape: Shape, rounds: int, device: torch.device, report: Report) -> None:
    """The three figures of one shape."""
    figure = "lora_linear_" + "x".join(map(str, shape))
    both = layers(shape, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape[0], shape[1], generator=generator).to(device).requires_grad_()
    grad = torch.randn(shape[0], shape[2], generator=generator).to(device)
    details = {"largest_relative_difference": float(f"{largest_difference(both, x, grad):.1e}")}

    passes = {side: forward_backward(layer, x, grad) for side, layer in both.items()}
    seconds = interleave({side: timer(both_ways, device) for side, both_ways in passes.items()}, rounds, warmup=3)
    report.add(figure, **seconds, goal=GOALS.get(shape), **details)

    libraries = {"ours": both["ours"], **small_libraries(both["ours"])}
    expected, *others = (gradients(layer, x, grad)[0] for layer in libraries.values())
    assert all(torch.allclose(output, expected, rtol=1e-3, atol=1e-3) for output in others)
    timers = {name: timer(forward_backward(layer, x, grad), device) for name, layer in libraries.items()}
    seconds = interleave(timers, rounds, warmup=3)
    best = min(("loralib", "minlora"), key=lambda name: statistics.median(seconds[name]))
    goal = SMALL_LIBRARY_GOALS.get(shape)
    report.add(f"{figure}_small_libraries", seconds["ours"], seconds[best], goal=goal, best=best)

    peaks = {}
    for side, both_ways in passes.items():
        clear(both, x)
        peaks[side] = [peak_allocated(both_ways, device) / 2**20]
    report.add(f"{figure}_peak", **peaks, unit="MiB", goal=PEAK_GOAL, **details)
    saved = {side: [saved_bytes(layer, x) / 2**20] for side, layer in both.items()}
    report.add(f"{figure}_saved", **saved, unit="MiB", **details)


def clear(both: dict[str, nn.Module], x: Tensor) -> None:
    """Drop all gradients."""
    x.grad = None
    for layer in both.values():
        layer.zero_grad(set_to_none=True)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=25)
    flags.add_argument(
        "--shape", nargs="+", type=shape_of, default=list(GOALS), metavar="TxIxOxR", help="tokens x in x out x rank"
    )
    args = flags.parse_args(argv)
    device = prepare(args)
    report = Report(args)
    for shape in args.shape:
        measure(shape, args.rounds, device, report)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
