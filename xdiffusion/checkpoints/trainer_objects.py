"""What a trainer left in a pickled file beside the weights: read as objects that hold nothing and do nothing.

Stable Diffusion 1.x was published as the checkpoints of its trainer, which name the class of a callback and numpy's numbers;
early learned words lie in a module of torch. torch refuses such a file as a whole. Here each of those names stands for an
empty object, so the weights can be had, and still nothing in the file is run. All other names are refused as before, and
so is a dict of a kind of its own that is not empty, which torch does not fill.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.", "omegaconf.", "typing.")
THEIR_PARTS = (
    "argparse.Namespace",
    "collections.defaultdict",
    *(f"builtins.{t}" for t in ("dict", "float", "int", "list", "str")),
)
PARAMETERS = "torch.nn.modules.container.ParameterDict"


MAX_NAMES = 100  # torch looks through all of them at each one; a trainer's checkpoint names a dozen


class Nothing:
    """Takes what an object is made of, and forgets it."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Parameters(dict):
    """What a `torch.nn.ParameterDict` held."""

    def __setstate__(self, state: Any) -> None:
        self.update(state["_parameters"])


def as_nothing(path: Path) -> AbstractContextManager:
    """Within this block torch reads the trainers' objects in the file at `path` as `Nothing`.

    Raises:
        ValueError, RuntimeError, EOFError: if it is no whole archive of torch's.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    kinds = {name: Nothing for name in names if name.startswith(LIBRARIES) or name in THEIR_PARTS}
    kinds |= {name: Parameters for name in names if name == PARAMETERS}
    if len(kinds) > MAX_NAMES:
        raise ValueError(f"it names {len(kinds)} objects of trainers; allowed are {MAX_NAMES}")
    return torch.serialization.safe_globals([_named(name, kind) for name, kind in kinds.items()])


def _named(name: str, kind: type) -> type:
    """A class of that kind whose name is another one's."""
    module, _, own = name.rpartition(".")
    return type(own, (kind,), {"__module__": module})
