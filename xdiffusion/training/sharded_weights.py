"""Each process keeps its rows of every weight, and of its gradient, moments and average ([ZeRO] section 5; torch's FSDP2).

`fully_shard` makes parameters DTensors, cut along their first dimension. A block's weights are gathered when it begins to
compute, forward or backward, and dropped when it has; the gradients of all processes meet in the rows of each. Torch's parts
for it are imported where a run asks for it: they take as long as a third of torch.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from xdiffusion.training.task import Task


def check_can_be_sharded(task: Task) -> None:
    """Raise ValueError where training.shard_weights=true and the run is not a plain one of all the network's weights."""
    settings, optimizer = task.settings, task.optimizer_settings
    if not settings.shard_weights:
        return
    trained = {id(p) for p in task.model.parameters() if p.requires_grad}
    if trained != set(map(id, task.network.parameters())):
        raise ValueError(
            "training.shard_weights=true is for runs that train all of the network; a LoRA, a learned word or the tiny CLIP "
            "is small: leave it false, and every process keeps the whole of it (DDP)"
        )
    if not hasattr(task.network, "blocks"):
        raise ValueError(f"training.shard_weights=true: a {type(task.network).__name__} does not name its blocks()")
    for key, value, instead in (
        ("training.mixed_precision", settings.mixed_precision, {"fp16": "bf16"}),
        ("training.compile", settings.compile, {True: "false"}),
        ("optimizer.kind", optimizer.kind, {"adamw8bit": "adamw"}),
    ):
        if value in instead:
            raise ValueError(f"training.shard_weights=true does not go with {key}={value}; take {instead[value]}")


def shard(network: nn.Module, device: torch.device) -> None:
    """Cut the network's weights in place; all processes must hold the same and call it.

    Args:
        network: on `device`; its `blocks()` are gathered one by one, what lies outside them for the whole pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    network.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    for part in (*network.blocks(), network):
        # the outermost too, which torch would leave gathered: a sample grid's averages, in the training step after it
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here is changed in place
    own = sum(local(p).numel() for p in network.parameters())
    whole = sum(p.numel() for p in network.parameters())
    print(f"sharded weights: {own:,} of {whole:,} in this process")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds rows of it only: whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the same memory; all of a tensor that is not sharded."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor; of a sharded one all processes must call it."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def host_copy(tree: Any, keep: bool = True) -> Any:
    """Dicts and lists of tensors, copied to host memory; without keep None for each, after its part in gathering it."""
    if isinstance(tree, Tensor):
        whole = gathered(tree)
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(tree, dict):
        return {key: host_copy(value, keep) for key, value in tree.items()}
    return type(tree)(host_copy(value, keep) for value in tree) if isinstance(tree, (list, tuple)) else tree


def rows_of(whole: Tensor, like: Tensor) -> Tensor:
    """What `local(like)` would be if `like` were `whole`, which every process has."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(whole.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def laid_out_as(parameter: Tensor, whole: Tensor) -> Tensor:
    """A copy of `whole` that is cut and lies in memory as its parameter does, which the fused AdamW relies on."""
    copy = torch.empty_like(parameter, dtype=whole.dtype, requires_grad=False)
    local(copy).copy_(rows_of(whole, parameter))
    return copy
