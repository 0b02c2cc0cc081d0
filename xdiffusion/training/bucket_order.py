"""Which pictures each step sees when they are of several shapes: every batch is of one shape, none is left out.

Each bucket is an endless stream of its own pictures (a `DataOrder`), and the steps are shared out among the buckets in
proportion to their sizes, as evenly as whole steps allow. So every picture is seen equally often in the long run, no
batch is short, and what a step sees is a function of the seed and the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from xdiffusion.training.randomness import DataOrder, generator_at


class BucketOrder:
    """As `DataOrder`, over buckets of indices.

    Args:
        buckets: the indices of each bucket's pictures.
        batch_size: pictures per step.
        seed: of the permutations and of the order of the buckets.
    """

    def __init__(self, buckets: Sequence[Int[Tensor, " n"]], batch_size: int, seed: int):
        self.buckets = list(buckets)
        sizes = [len(bucket) for bucket in self.buckets]
        self.orders = [
            DataOrder(size, batch_size, int(generator_at(seed, "bucket", k).initial_seed())) for k, size in enumerate(sizes)
        ]
        turns = torch.tensor([size // math.gcd(*sizes) for size in sizes])
        self.cycle = int(turns.sum())
        offsets = torch.rand(len(sizes), generator=generator_at(seed, "buckets"), dtype=torch.float64)
        # turn j of a bucket with n turns stands at (j + offset) / n of the cycle
        places = torch.cat([(torch.arange(n) + offset) / n for n, offset in zip(turns.tolist(), offsets)])
        owners = torch.repeat_interleave(torch.arange(len(sizes)), turns)
        self.owners = owners[places.argsort(stable=True)]  # (cycle,)
        self.turns = turns.tolist()

    def indices(self, step: int) -> Int[Tensor, " B"]:
        """The picture indices of a step (from 0), all of one bucket."""
        cycles, place = divmod(step, self.cycle)
        k = int(self.owners[place])
        turn = cycles * self.turns[k] + int((self.owners[:place] == k).sum())
        return self.buckets[k][self.orders[k].indices(turn)]
