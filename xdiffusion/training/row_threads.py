"""On a CPU: each core takes its rows of the batch through the whole network, forward and backward.

The operations of a small network are too short to be shared out one by one: at each of them the cores wait for each other.
Rows are independent until their gradients are added, so each share of them has a thread, and its part of the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import torch
from torch import Tensor, nn

from xdiffusion.model import DiffusionModel
from xdiffusion.training.settings import TrainingSettings

MOST_SHARES = 4  # Python's own work for each share, some milliseconds a step, is done by one core at a time


class RowThreads:
    """Differentiates a loss in equal shares, side by side.

    Args:
        parameters: what to differentiate by.
        shares: threads, each with one share.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], shares: int):
        self.parameters = list(parameters)
        self.shares = shares
        cores = max(1, torch.get_num_threads() // shares)
        self.pool = ThreadPoolExecutor(shares, "rows", initializer=torch.set_num_threads, initargs=(cores,))

    def backward(self, loss_of_share: Callable[[int], Tensor]) -> Tensor:
        """The sum of the shares' losses; its gradient is added to that of the parameters.

        The shares are added up in their order, so the result does not depend on which thread is done first.
        """
        losses, gradients = zip(*self.pool.map(lambda i: self.differentiate(loss_of_share(i)), range(self.shares)))
        list(self.pool.map(lambda i: self.add_up(gradients, i), range(self.shares)))
        return torch.stack(losses).sum()

    def differentiate(self, loss: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """A share's loss, and its gradient."""
        return loss.detach(), torch.autograd.grad(loss, self.parameters, allow_unused=True)

    @torch.no_grad()
    def add_up(self, gradients: Sequence[Sequence[Tensor | None]], i: int) -> None:
        """Add the shares' gradients of every `shares`-th parameter to it, from parameter i on."""
        for k in range(i, len(self.parameters), self.shares):
            parts = [share[k] for share in gradients if share[k] is not None]
            if not parts:
                continue
            parameter, gradient = self.parameters[k], reduce(torch.add, parts)
            if parameter.grad is None:
                parameter.grad = _laid_out_as(parameter, gradient)
            else:
                parameter.grad += gradient


def _laid_out_as(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """The gradient in its parameter's memory layout, which the fused AdamW relies on and `backward()` would see to."""
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


def shares_of_a_step(model: DiffusionModel, settings: TrainingSettings, device: torch.device, processes: int) -> int:
    """Into how many shares the rows of a step are dealt, at most one per thread that torch may use.

    1 where they stay together: on a GPU, in one of several processes, in a compiled or a checkpointed network, with
    dropout (which draws from a generator that the threads would share), and where no such number divides them.
    """
    most, rows = min(MOST_SHARES, torch.get_num_threads()), settings.batch_size // settings.gradient_accumulation_steps
    drops_out = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) or any(
        adapter.dropout > 0 for m in model.modules() for adapter in getattr(m, "adapters", {}).values()
    )
    apart = device.type == "cpu" and processes == 1 and not (settings.compile or settings.gradient_checkpointing)
    return next(n for n in range(most, 0, -1) if rows % n == 0) if apart and not drops_out else 1
