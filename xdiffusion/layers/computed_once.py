"""Computing once what repeats while a model is sampled: a text's keys and values, a weight with its LoRAs in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def computed_once(model: nn.Module) -> Iterator[None]:
    """Within this block each module of `model` that can keeps what it would compute again at every step.

    Such a module has the methods `keep_results()` and `drop_results()`. For sampling: the weights must not change and no
    gradient may be needed inside the block.
    """
    keeping = [m for m in model.modules() if hasattr(m, "keep_results")]
    for module in keeping:
        module.keep_results()
    try:
        yield
    finally:
        for module in keeping:
            module.drop_results()
