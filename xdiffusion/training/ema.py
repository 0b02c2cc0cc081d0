"""Exponential moving average of the trained weights: what is sampled and saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from xdiffusion.training.sharded_weights import local


class EMA:
    """average <- decay * average + (1 - decay) * weights, after each step.

    As in [DDPM] appendix B. Early on the decay is (1 + step) / (10 + step), as TensorFlow has it, so that the average spans
    the last tenth of the run and forgets the start; `decay` is its ceiling.

    Args:
        parameters: the trained weights.
        decay: the ceiling in [0, 1); 0 makes the average the weights themselves.

    Attributes:
        average: tensors like the parameters; within `in_place()` the weights, which the model does not hold then.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"training.ema_decay={decay} must be in [0, 1)")
        self.parameters = list(parameters)
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]
        self._in_place = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps (the first is 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(map(local, self.average)), list(map(local, self.parameters)), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block the model holds the average; the trained weights come back after it, untouched."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def trained(self) -> list[torch.Tensor]:
        """The weights without averaging, wherever they are now."""
        return self.average if self._in_place else [p.data for p in self.parameters]

    @torch.no_grad()
    def _exchange(self) -> None:
        """Weights and average change places, value by value: a sharded parameter cannot be given other memory."""
        for parameter, average in zip(map(local, self.parameters), map(local, self.average)):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)
        self._in_place = not self._in_place
