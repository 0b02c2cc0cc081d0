"""What an adapter is, beside its factors: rank, lora_alpha, variant, and how strong it is at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from torch import nn

from xdiffusion.checkpoints.lora_file import LoRAFactors, scaling_of

DEFAULT_ADAPTER = "default"
Init = Literal["zero_b", "pissa", "orthogonal"]


class LoRAError(ValueError):
    """A LoRA that cannot be made, applied, saved or loaded: which one, and why."""


@dataclass
class AdapterSettings:
    """All but scale and enabled are fixed when the adapter is made; dropout acts in training.

    use_rslora: divide lora_alpha by sqrt(rank), so that a larger rank does not learn more slowly ([rsLoRA] theorem 3.2).
    use_dora: the adapter has a magnitude per output of its own ([DoRA] eq. 5).
    scale: strength at run time, 0 = base, 1 = as trained.
    """

    rank: int
    lora_alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    scale: float = 1.0
    enabled: bool = True

    @property
    def scaling(self) -> float:
        return scaling_of(self.lora_alpha, self.rank, self.use_rslora)

    @property
    def strength(self) -> float:
        """scale * scaling, what B A is multiplied by while the adapter is enabled."""
        return self.scale * self.scaling


def check_settings(
    rank: int,
    dropout: float,
    init: Init,
    weight_shape: Sequence[int],
    layer: str = "",
    lora_alpha: float = 1.0,
) -> None:
    """Complain of an adapter that a weight (out, in, *kernel) cannot have; `layer` is its name, where it is known.

    Raises:
        LoRAError: for an init that is none of the three; for a lora_alpha that is 0 or not finite, or negative with PiSSA,
            which takes its root; for a dropout outside [0, 1); for a rank that is no whole number from 1 to the larger side
            of the flattened weight, odd with orthogonal factors, or with PiSSA above the smaller side, the number of
            singular vectors, or half of the larger, since its file has twice the rank.
    """
    if init not in get_args(Init):
        raise LoRAError(f"LoRA init={init!r} must be one of {', '.join(get_args(Init))}")
    if not _is_number(lora_alpha) or lora_alpha == 0 or (init == "pissa" and lora_alpha < 0):
        allowed = "above 0 for init='pissa'" if init == "pissa" else "other than 0"
        raise LoRAError(f"lora_alpha={lora_alpha!r}{f' of {layer}' if layer else ''} must be a number {allowed}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise LoRAError(f"LoRA dropout={dropout!r} must be in [0, 1)")
    sides = sorted((weight_shape[0], math.prod(weight_shape[1:])))
    largest = min(sides[0], sides[1] // 2) if init == "pissa" else sides[1]
    of = f" of init={init!r}" if init == "pissa" else ""
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    if not whole or not 1 <= rank <= largest:
        where = f"{layer}, a weight" if layer else "a weight"
        kind = "" if whole else " a whole number"
        raise LoRAError(f"LoRA rank={rank!r}{of} must be{kind} in 1..{largest} for {where} {tuple(weight_shape)}")
    if init == "orthogonal" and rank % 2:
        raise LoRAError(f"LoRA rank={rank} must be even for init='orthogonal', which halves it")


def check_adapter_name(adapter_name: str) -> None:
    """Complain of a name that parameters cannot have.

    Raises:
        LoRAError: if it is no string, empty, has a dot, or is an attribute of nn.ParameterDict.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise LoRAError(f"adapter_name={adapter_name!r} must be a string of at least one letter that holds no dot")
    if hasattr(nn.ParameterDict(), adapter_name):
        raise LoRAError(f"adapter_name={adapter_name!r} must be no attribute of nn.ParameterDict")


def check_scale(scale: float) -> None:
    """Complain of a strength that would make NaN of every output.

    Raises:
        LoRAError: if it is no finite number.
    """
    if not _is_number(scale):
        raise LoRAError(f"LoRA scale={scale!r} must be a finite number")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def check_factors(factors: LoRAFactors, weight_shape: Sequence[int], layer: str = "a layer") -> None:
    """Complain of factors of another layer.

    Raises:
        LoRAError: unless their shapes fit a weight (out, in, *kernel).
    """
    out_size, *in_shape = weight_shape
    rank, ones = factors.rank, [1] * (len(in_shape) - 1)
    fits = factors.lora_A.shape == (rank, *in_shape) and factors.lora_B.shape == (out_size, rank, *ones)
    if not fits or (factors.magnitude is not None and factors.magnitude.shape != (out_size,)):
        raise LoRAError(
            f"{layer} has weight {tuple(weight_shape)}, which the factors "
            f"A {tuple(factors.lora_A.shape)} and B {tuple(factors.lora_B.shape)} do not fit"
        )
