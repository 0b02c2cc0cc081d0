"""Randomness by position: every draw of a run is a function of the seed and of where in the run it is made.

Nothing has to be saved to resume a run exactly, and nothing depends on how many processes share a batch.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor


def generator_at(seed: int, stream: str, position: int = 0) -> torch.Generator:
    """A fresh CPU generator for one position of one named stream."""
    digest = hashlib.blake2b(f"{seed}|{stream}|{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def after_rollbacks(stream: str, rollbacks: int) -> str:
    """The name of a stream that is drawn anew each time a run goes back."""
    return f"{stream} {rollbacks}" if rollbacks else stream


class DataOrder:
    """Which samples each step sees: epoch after epoch, each a fresh permutation, cut into batches without a remainder.

    Args:
        size: of the data set.
        batch_size: samples per step.
        seed: of the permutations.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self._epochs: dict[int, Tensor] = {}

    def indices(self, step: int) -> Int[Tensor, " B"]:
        """The sample indices of a step (from 0); a batch may span two epochs."""
        pieces, first, wanted = [], step * self.batch_size, self.batch_size
        while wanted:
            epoch, start = divmod(first, self.size)
            piece = self._permutation(epoch)[start : start + wanted]
            pieces.append(piece)
            first, wanted = first + len(piece), wanted - len(piece)
        return torch.cat(pieces)

    def _permutation(self, epoch: int) -> Int[Tensor, " N"]:
        epochs = self._epochs  # another thread, which reads ahead, may replace it meanwhile
        if (order := epochs.get(epoch)) is None:
            order = torch.randperm(self.size, generator=generator_at(self.seed, "order", epoch))
            self._epochs = {e: kept for e, kept in epochs.items() if e == epoch - 1} | {epoch: order}
        return order


class Consecutive:
    """As `DataOrder`, of a set that mixes its pictures itself: each step sees the next ones, without an end."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size

    def indices(self, step: int) -> Int[Tensor, " B"]:
        """The numbers of a step (from 0) within the set's sequence."""
        return torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
