"""Small trained weights side by side in one buffer, and their gradients in another.

A network of two million weights has three hundred tensors. AdamW and the moving average do to one long tensor what they do to
three hundred short ones, in half the time: the other half was calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, count, islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from xdiffusion.training.sharded_weights import is_sharded

LARGEST_PACKED = 2**17  # values; beyond, calls cost nothing, and a gradient that outlasts its step would cost memory
ALIGNMENT = 16  # values: each parameter begins a cache line
ROW = 2**12  # values: a buffer has a whole number of them
Key = TypeVar("Key")


class PackedWeights:
    """Parameters, of which the small ones become views of a buffer, one for each group; shapes and memory layouts stay.

    Their gradients are views from now on too: `zero_grad` here, not the optimizer's, ends a step. A small weight that no loss
    reaches has the gradient 0, not None: AdamW decays it as all others.

    Args:
        groups: the parameters, where they will stay.
        largest: values of the largest parameter that is packed; 0 packs none.

    Attributes:
        parameters: of all groups in a row.
        groups: what to update in their place: a group's buffer, and the parameters that are not in it.
        updated: the same in a row.
    """

    def __init__(self, groups: Mapping[Key, Sequence[nn.Parameter]], largest: int = LARGEST_PACKED):
        self.parameters = [p for group in groups.values() for p in group]
        self._sizes = [len(group) for group in groups.values()]
        self.groups: dict[Key, list[nn.Parameter]] = {}
        self.updated: list[nn.Parameter] = []
        self._places: list[tuple[int, int | None]] = []  # of each parameter: in which of `updated`, and from where on
        for key, group in groups.items():
            small = [p for p in group if p.numel() <= largest and p.dtype == torch.float32 and not is_sharded(p)]
            ends = list(accumulate((-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in small), initial=0))
            offsets = dict(zip(map(id, small), ends))
            first = len(self.updated)
            if small:
                size = -(-ends[-1] // ROW) * ROW
                self.updated.append(nn.Parameter(torch.zeros(size, device=small[0].device)))
                self.updated[first].grad = torch.zeros_like(self.updated[first])
            for parameter in group:
                offset = offsets.get(id(parameter))
                if offset is None:
                    self.updated.append(parameter)
                self._places.append((len(self.updated) - 1 if offset is None else first, offset))
            self.groups[key] = self.updated[first:]
        for i, parameter in enumerate(self.parameters):
            owner, offset = self._places[i]
            if offset is not None:
                values = self._part(self.updated[owner].data, i)
                parameter.data, parameter.grad = values.copy_(parameter.data), self._part(self.updated[owner].grad, i)

    def zero_grad(self) -> None:
        """Forget the gradients; those in a buffer become 0."""
        buffers = {owner for owner, offset in self._places if offset is not None}
        for i, parameter in enumerate(self.updated):
            if i in buffers:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors like `updated` (their averages, say) what belongs to each of `parameters`, in the same memory."""
        return [self._part(tensors[owner], i) for i, (owner, _) in enumerate(self._places)]

    def _part(self, tensor: Tensor, i: int) -> Tensor:
        offset = self._places[i][1]
        if offset is None:
            return tensor
        like = torch.empty_like(self.parameters[i], device="meta")  # its layout, without holes
        return tensor.as_strided(like.shape, like.stride(), offset)

    def unpacked_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The `state_dict` of an AdamW that updates `groups`, as it would be if it updated the parameters."""
        moments = {
            i: {name: value if name == "step" else self._part(value, i) for name, value in state["state"][owner].items()}
            for i, (owner, _) in enumerate(self._places)
            if owner in state["state"]
        }
        return {"state": moments, "param_groups": _numbered(state["param_groups"], self._sizes)}

    def check_groups(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a `state_dict` of other groups of parameters."""
        saved = [len(group["params"]) for group in state["param_groups"]]
        if saved != self._sizes:
            raise ValueError(f"its optimizer has groups of {saved} weights, this run of {self._sizes}")

    def packed_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `unpacked_state`."""
        moments: dict[int, dict[str, Any]] = {}
        for i, values in state["state"].items():
            owner, offset = self._places[i]
            if offset is None:
                moments[owner] = values
                continue
            whole = moments.setdefault(owner, {"step": values["step"]})
            for name in values.keys() - {"step"}:
                self._part(whole.setdefault(name, torch.zeros_like(self.updated[owner].data)), i).copy_(values[name])
        return {"state": moments, "param_groups": _numbered(state["param_groups"], map(len, self.groups.values()))}


def _numbered(groups: Sequence[dict[str, Any]], sizes: Iterable[int]) -> list[dict[str, Any]]:
    """An optimizer's groups with their parameters numbered in a row, as its `state_dict` has them."""
    numbers = count()
    return [group | {"params": list(islice(numbers, size))} for group, size in zip(groups, sizes)]
