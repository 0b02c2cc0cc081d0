"""On a CPU: each core takes its rows of the batch through the whole network, forward and backward.

The operations of a small network are too short to be shared out one by one: at each of them the cores wait for each other.
Rows are independent until their gradients are added, so each share of them has a thread, and its part of the cores. What
concerns weights alone, forming W' of a LoRA say, is done once for all shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn

from xdiffusion.lora.formed_weights import formed_once
from xdiffusion.lora.functional import in_layout_of
from xdiffusion.lora.layers import LoRALayer
from xdiffusion.training.task import Task

MOST_SHARES = 4  # Python's own work for each share, some milliseconds a step, is done by one core at a time


class RowThreads:
    """Differentiates a loss in equal shares, side by side.

    Args:
        parameters: what to differentiate by.
        shares: threads, each with one share.
        layers: whose W' is formed once for all shares; their parameters may be among `parameters`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], shares: int, layers: Sequence[LoRALayer] = ()):
        self.shares, self.layers = shares, layers
        in_weights = {id(p) for layer in layers for name in layer.adapters for p in layer.trained_parameters(name)}
        self.parameters = [p for p in parameters if id(p) not in in_weights]
        self.cores = max(1, torch.get_num_threads() // shares)
        self.pool = ThreadPoolExecutor(shares, "rows", initializer=torch.set_num_threads, initargs=(self.cores,))

    def backward(self, loss_of_share: Callable[[int], Tensor]) -> Tensor:
        """The sum of the shares' losses; its gradient is added to that of the parameters.

        The shares are added up in their order, so the result does not depend on which thread is done first.
        """
        with formed_once(self.layers) as weights:
            leaves = [*self.parameters, *weights]
            passes = self.pool.map(lambda i: self.differentiate(i, loss_of_share(i), leaves), range(self.shares))
            losses, (_, *gradients) = zip(*passes)
            list(self.pool.map(lambda i: self.add_up(leaves, gradients, i), range(self.shares)))
        return torch.stack(losses).sum()

    def differentiate(self, share: int, loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """A share's loss, and its gradient; the first one's is added to the leaves' as it comes."""
        if share == 0:
            loss.backward(inputs=leaves)
            return loss.detach(), ()
        return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)

    @torch.no_grad()
    def add_up(self, leaves: Sequence[Tensor], gradients: Sequence[Sequence[Tensor | None]], i: int) -> None:
        """Add the other shares' gradients of every `shares`-th leaf to it, from leaf i on."""
        own = range(i, len(leaves), self.shares)
        begun = [k for k in own if leaves[k].grad is not None]
        for share in gradients:
            if reached := [k for k in begun if share[k] is not None]:
                torch._foreach_add_([leaves[k].grad for k in reached], [share[k] for k in reached])
        for k in set(own).difference(begun):
            if parts := [share[k] for share in gradients if share[k] is not None]:
                # `backward()` would see to the layout, on which the fused AdamW relies
                leaves[k].grad = in_layout_of(leaves[k], reduce(torch.add, parts))

    @contextmanager
    def as_one_of_them(self) -> Iterator[None]:
        """Within this block the calling thread has no more cores than a share has.

        A team of OpenMP threads spins for a while when it is done, on the cores that the shares need: beside another busy
        process a step with one took six times as long.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.cores)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def shares_of_a_step(task: Task, device: torch.device, processes: int) -> int:
    """Into how many shares the rows of a step are dealt, at most one per thread that torch may use.

    1 where they stay together: on a GPU, in one of several processes, in a compiled or a checkpointed network, with a LoRA's
    dropout (which draws from a generator that the threads would share), and where no such number divides them.
    """
    settings = task.settings
    most, rows = min(MOST_SHARES, torch.get_num_threads()), task.rows // settings.gradient_accumulation_steps
    drops_out = any(a.dropout > 0 for m in task.model.modules() for a in getattr(m, "adapters", {}).values())
    apart = device.type == "cpu" and processes == 1 and not (settings.compile or settings.gradient_checkpointing)
    return next(n for n in range(most, 0, -1) if rows % n == 0) if apart and not drops_out else 1
