"""Which weights a LoRA was trained on, by a few numbers of each that it adapts.

A hash changes with the precision of a file and with layers that a LoRA has nothing to do with. A sample stays the same, up to
rounding, in float16, bfloat16 and every layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.lora.settings import LoRAError

VALUES = 4  # of each weight
ROUNDING = 0.005  # of a value; bfloat16 keeps it to 0.004
OTHER_FORM = "trained on these weights in another precision, or beside others"


def sample_of(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """A few values of each layer's weight, by layer, at places that follow from its shape, to five digits."""
    return {name: [float(f"{value:.5g}") for value in _values(weight)] for name, weight in weights.items()}


def check_base(lora: LoRAFile, base_hash: str | None, weights: Mapping[str, Tensor], path: object) -> str | None:
    """See that a LoRA was trained on these weights, where that is known; a line if they are the same in another form only.

    Args:
        lora: its base_hash and base_sample are looked at.
        base_hash: of the model; None where it is not known, and the sample alone tells.
        weights: of the layers that the LoRA adapts, by layer, in whatever spelling.
        path: of the LoRA, for the error.

    Raises:
        LoRAError: if it was trained on others.
    """
    weights = {name: weight for name, weight in weights.items() if weight.is_floating_point() and not weight.is_meta}
    if not lora.base_hash or base_hash == lora.base_hash or not (base_hash or (lora.base_sample and weights)):
        return None  # quantized weights, and those that are not there yet, have no values to compare
    sample = {exchange_name(name): values for name, values in lora.base_sample.items()}
    if weights and all(_is_sample(sample.get(exchange_name(name)), weight) for name, weight in weights.items()):
        return OTHER_FORM if base_hash else None
    raise LoRAError(
        f"{path} was trained on another base: it names {lora.base_hash}, "
        f"{f'this model is {base_hash}' if base_hash else 'with other weights in the layers that it adapts'}; "
        "--allow_other_base (allow_other_base=True) applies it all the same"
    )


def _is_sample(values: Sequence[float] | None, weight: Tensor) -> bool:
    """Whether these are a weight's values up to rounding."""
    here = _values(weight)
    return len(values or ()) == len(here) and all(abs(a - b) <= ROUNDING * abs(a) + 1e-6 for a, b in zip(values, here))


def _values(weight: Tensor) -> list[float]:
    count = weight.numel()
    places = [(2 * i + 1) * count // (2 * VALUES) for i in range(VALUES)]
    # torch's own `unravel_index` would load its symbolic shapes, a third of a second of every start
    return weight.detach()[np.unravel_index(places, weight.shape)].double().tolist()
