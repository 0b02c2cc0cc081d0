"""Several processes, one batch: each differentiates its rows, and the gradients are added up.

A process' loss is its share of the batch's mean, so the sum of the gradients, not their mean, is the batch's: a run has
the same losses, to rounding, on however many processes it runs. torch's DistributedDataParallel adds up while the backward
pass goes on, FSDP too (see `sharded_weights`); parameters outside the network (a text encoder's LoRA) are added up after it.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xdiffusion.training.settings import TrainingSettings
from xdiffusion.training.task import Task

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
FAILED = 1  # the exit status of a run that diverged or met a fault
PATIENCE = timedelta(days=2)  # for a download, or class images that are drawn; torch's own is 10 or 30 minutes
Item = TypeVar("Item")


def begin_process(force_cpu: bool) -> PartialState:
    """This process among those of a run, of which the first alone prints."""
    process = PartialState(cpu=force_cpu)
    if not process.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    return process


def check_shares(accelerator: Accelerator, task: Task) -> None:
    """Raise ValueError where the processes cannot share a batch equally, or are launched to share out the weights too."""
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"distributed type {accelerator.distributed_type.value}: the trainer shards weights itself, with torch's FSDP2; "
            "launch the processes as for DDP (MULTI_GPU) and set training.shard_weights=true"
        )
    accumulated = task.settings.gradient_accumulation_steps
    parts = accumulated * accelerator.num_processes
    if task.rows % parts:
        whole = task.rows == task.settings.batch_size
        raise ValueError(
            f"training.batch_size={task.settings.batch_size} cannot be shared by {accelerator.num_processes} processes with "
            f"training.gradient_accumulation_steps={accumulated}: {parts} must divide "
            f"{'it' if whole else f'its {task.rows} groups, each with one of every class'}"
        )


def check_precision(process: Accelerator | PartialState, settings: TrainingSettings) -> None:
    """Raise ValueError for a precision that the device cannot have; accelerate would compute in float32 without a word."""
    if settings.mixed_precision == "fp16" and process.device.type == "cpu":
        raise ValueError("training.mixed_precision=fp16 needs a GPU; on a CPU take bf16 or no")


@contextmanager
def first_ones_first(process: PartialState) -> Iterator[None]:
    """The first process of all goes through this block, then the first of every other machine, then the others.

    So what is downloaded or made is there once for a machine, whether the machines share a disk or not. The others wait as
    long as that takes; one that fails ends the wait.
    """
    if process.num_processes == 1:
        yield
        return
    waiting = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    turn = 0 if process.is_main_process else 1 if process.is_local_main_process else 2
    for _ in range(turn):
        torch.distributed.barrier(waiting)
    yield
    for _ in range(turn, 2):
        torch.distributed.barrier(waiting)


def in_own_order(items: Sequence[Item]) -> list[Item]:
    """All items, in an order that each process has to itself.

    Processes that leave out what another has put on their disk by then share the work almost evenly, with nothing to wait for,
    and whether all of them share a disk or those of each machine do.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(rank)) if rank else range(len(items))
    return [items[int(i)] for i in order]


def check_same_everywhere(process: Accelerator | PartialState, hashes: Mapping[str, str]) -> None:
    """Raise ValueError where another process has another hash of the same thing; all processes call it, and all raise."""
    if process.num_processes == 1:
        return
    everyones = gather_object([dict(hashes)])
    for what, of_first in everyones[0].items():
        others = [str(rank) for rank, own in enumerate(everyones) if own[what] != of_first]
        if others:
            raise ValueError(
                f"the processes do not begin with the same {what}: {everyones[int(others[0])][what]:.24} in process "
                f"{', '.join(others)}, {of_first:.24} in process 0; give every machine the same files and flags"
            )


class LostProcess(RuntimeError):
    """Another process of the run is gone, or cannot be reached."""


def spread(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """The network as it runs in several processes: it adds its gradients up, where torch would take their mean."""
    if accelerator.num_processes > 1 and not any(p.requires_grad for p in network.parameters()):
        return network  # torch refuses a network that has nothing to add up
    network = accelerator.prepare(network)
    if isinstance(network, DistributedDataParallel):
        network.register_comm_hook(None, _add_up)
    return network


def only_add_up_last(accelerator: Accelerator, network: nn.Module, last: bool, sharded: bool) -> AbstractContextManager:
    """Of a batch's accumulation parts, the last alone has to talk to the other processes.

    With sharded weights each does: until then its gradients would be whole ones.
    """
    alone = last or accelerator.num_processes == 1 or sharded
    return nullcontext() if alone else accelerator.no_sync(network)


def summed(accelerator: Accelerator, loss: Tensor, unwrapped: Sequence[nn.Parameter]) -> Tensor:
    """The batch's loss from those of all shares; the gradients of `unwrapped` parameters are added up on the way."""
    if accelerator.num_processes > 1:
        for parameter in unwrapped:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
        torch.distributed.all_reduce(loss)
    return loss


def largest(accelerator: Accelerator | PartialState, number: int) -> int:
    """The largest of the processes' numbers; all get the same answer."""
    if accelerator.num_processes == 1:
        return number
    numbers = torch.tensor(number, device=accelerator.device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers)


@contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Say in words what torch.distributed raises where another process has died: by gloo's or NCCL's own message.

    Raises:
        LostProcess: in place of that.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            # gloo begins with its own source's path
            reason = re.sub(r"^\[.*?\] *", "", str(error).strip().splitlines()[0])
            raise LostProcess(f"another process of this run is gone or cannot be reached ({reason})") from error
        raise


def leaving_together(work: Callable[[], int]) -> int:
    """Do the work of this process, whose exit status it returns, and leave the others in order: one that just exits may abort
    in gloo's threads.

    One that fails does not wait for the others, who do not know of it and may be in the middle of a step: NCCL's way of
    leaving would. Where another one is lost there is nothing to leave; before the first step that is said here, later by the
    run itself.
    """
    try:
        with noticing_lost_processes():
            status = work()
    except LostProcess as error:
        _leave(failed=True, lost=True)
        print(f"error: before the first step, {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except BaseException:
        _leave(failed=True)
        raise
    _leave(failed=status == FAILED)
    return status


def _leave(*, failed: bool, lost: bool = False) -> None:
    if not torch.distributed.is_initialized():
        return
    if failed and "nccl" in torch.distributed.get_backend():
        atexit.register(_end_at_once)  # once the error is printed; torchrun sees it, and ends the others
    elif not lost:
        torch.distributed.destroy_process_group()


def _end_at_once() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(FAILED)


def _add_up(_, bucket):  # torch looks at annotations of a hook, and does not understand those of this module
    return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])
