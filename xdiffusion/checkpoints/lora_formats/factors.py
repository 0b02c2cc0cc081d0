"""From loose tensors to checked factors, and what writers do to factors: reshape, fold the scaling, round."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors

# module -> {"lora_A", "lora_B" and, if there, "alpha", "scale", "magnitude"}, or what `lycoris` makes those of
Parts = dict[str, dict[str, Tensor]]
_OF_XL = re.compile(r"te2_|text_encoder_2\.")
_OF_CONTEXT = re.compile(r"attn2[._]to_[kv]$")
MOST_ROUNDING = 0.01  # of an update; bfloat16 makes some 0.003 of plain factors
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def assemble(
    parts: Parts,
    path: Path,
    repairs: list[str],
    alpha_of: Callable[[str, int], tuple[float, bool]] | None = None,
    *,
    of_peft: bool = True,
) -> dict[str, LoRAFactors]:
    """Factors of each module, checked.

    Args:
        parts: tensors by module.
        path: of the file, for messages.
        repairs: gets a line for each thing that is put right.
        alpha_of: (module, rank) -> (lora_alpha, use_rslora), where a header has them; else they are in `parts`.
        of_peft: whether a DoRA magnitude may be (1, out, 1, 1), as peft's of convolutions, which is LyCORIS' of inputs.

    Raises:
        CheckpointError: if a factor is missing, or shapes, types or an alpha make no LoRA.
    """
    modules = {}
    for name, tensors in parts.items():
        missing = [part for part in ("lora_A", "lora_B") if part not in tensors]
        if missing:
            raise CheckpointError(f"{path}: one factor of {name} is missing: {' and '.join(missing)}")
        check_parts(tensors, name, path)
        lora_A, lora_B = _same_dimensions(tensors["lora_A"], tensors["lora_B"], name, path, repairs)
        rank = lora_A.shape[0]
        alpha, use_rslora = alpha_of(name, rank) if alpha_of else (_stored_alpha(tensors, rank, name, path, repairs), False)
        if not math.isfinite(alpha):
            raise CheckpointError(f"{path}: alpha {alpha} of {name} is no finite number")
        magnitude = _magnitude(tensors.get("magnitude"), lora_B.shape[0], name, path, of_peft)
        modules[name] = LoRAFactors(lora_A, lora_B, alpha, use_rslora, magnitude)
    return modules


def check_parts(parts: Mapping[str, Tensor], name: str, path: Path) -> None:
    """`check_tensor` of all parts of a module; an alpha or scale may be a whole number, as diffusers writes kohya's.

    Raises:
        CheckpointError: see `check_tensor`.
    """
    for part, tensor in parts.items():
        check_tensor(tensor, name, path, DTYPES + INTEGERS if part in ("alpha", "scale") else DTYPES)


def check_tensor(tensor: Tensor, name: str, path: Path, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """A dense float tensor that has the memory it claims: a pickle can claim any shape.

    Raises:
        CheckpointError: if it is none.
    """
    if tensor.layout != torch.strided or tensor.dtype not in dtypes or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: a tensor of {name} is {tensor.dtype} ({tensor.layout}), no plain float tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: a tensor of {name} claims the shape {tuple(tensor.shape)} without the data")


def fitted(factors: LoRAFactors, shape: tuple[int, ...]) -> LoRAFactors | None:
    """The same update with factors of the dimensions of a weight (2-D against a 1x1 convolution's 4-D); None if none."""
    lora_A, lora_B, rank = factors.lora_A, factors.lora_B, factors.rank
    as_is = lora_A.shape[1:] == shape[1:]
    flat = lora_A.dim() != len(shape) and lora_A.shape[1:].numel() == prod(shape[1:])
    if not (as_is or flat) or lora_B.shape[0] != shape[0]:
        return None
    lora_A = lora_A.reshape(rank, *shape[1:])
    return replace(factors, lora_A=lora_A, lora_B=lora_B.reshape(shape[0], rank, *[1] * (len(shape) - 2)))


def said_of_xl(lora_A: Mapping[str, Tensor]) -> str:
    """The end of an error's sentence for a file whose modules are Stable Diffusion XL's: "" for others.

    It has a second text encoder, and its texts have 2048 numbers per token.
    """
    of_xl = any(
        _OF_XL.search(name) or (_OF_CONTEXT.search(name) and factor.dim() > 1 and factor.shape[1] == 2048)
        for name, factor in lora_A.items()
    )
    return ": it is a LoRA for Stable Diffusion XL, which is another model" if of_xl else ""


def fit(
    modules: Mapping[str, LoRAFactors], table: Mapping[str, tuple[int, ...]], path: Path, repairs: list[str]
) -> dict[str, LoRAFactors]:
    """Every module that the table has, in the dimensions of its weight; the others as they are.

    Raises:
        CheckpointError: if a module's factors do not fit its weight.
    """
    result = dict(modules)
    for name in modules.keys() & table.keys():
        result[name] = fitted(modules[name], table[name])
        if result[name] is None:
            raise CheckpointError(
                f"{path}: {name} has weight {table[name]}, the file's factors are "
                f"A {tuple(modules[name].lora_A.shape)} and B {tuple(modules[name].lora_B.shape)}"
                + said_of_xl({n: f.lora_A for n, f in modules.items()})
            )
    reshaped = sorted(n for n in modules if result[n].lora_A.dim() != modules[n].lora_A.dim())
    if reshaped:
        repairs.append(f"{len(reshaped)} factors reshaped to the dimensions of their weights, such as {reshaped[0]}")
    return result


def folded(factors: LoRAFactors) -> LoRAFactors:
    """The same update with scaling 1: lora_B takes it, in float32 where its own type would round the product."""
    if factors.scaling == 1:
        return replace(factors, lora_alpha=float(factors.rank), use_rslora=False)
    wide = factors.lora_B.to(torch.promote_types(factors.lora_B.dtype, torch.float32)) * factors.scaling
    narrow = wide.to(factors.lora_B.dtype)
    lora_B = narrow if torch.equal(narrow.to(wide.dtype), wide) else wide
    return replace(factors, lora_B=lora_B, lora_alpha=float(factors.rank), use_rslora=False)


class RoundingError(CheckpointError):
    """Factors that a type cannot hold."""


def rounded(factors: LoRAFactors, dtype: torch.dtype, name: str) -> LoRAFactors:
    """The factors in another type.

    Raises:
        RoundingError: if one overflows in it, or their product is another one, because they are too small for the type or
            cancel: PiSSA's file holds the trained factors beside the first ones, whose product it takes away.
    """
    type_name = str(dtype).removeprefix("torch.")
    befores = (factors.lora_A, factors.lora_B, factors.magnitude)
    afters = [None if before is None else before.to(dtype) for before in befores]
    for before, after in zip(befores, afters):
        if before is not None and not torch.equal(before.isfinite(), after.isfinite()):
            raise RoundingError(f"a factor of {name} overflows in {type_name}")
    result = replace(factors, lora_A=afters[0], lora_B=afters[1], magnitude=afters[2])
    delta = factors.delta()
    error = (result.delta() - delta).norm() / delta.norm()
    if error > MOST_ROUNDING:  # not of a fresh one, 0 / 0
        raise RoundingError(f"the update of {name} would be off by {error:.0%} in {type_name}")
    return result


def _same_dimensions(lora_A: Tensor, lora_B: Tensor, name: str, path: Path, repairs: list[str]) -> tuple[Tensor, Tensor]:
    """A (rank, in, *kernel) and B (out, rank, *ones); B's ones are added or left out as A needs them."""
    shapes = f"A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
    if not 2 <= lora_A.dim() <= 4 or lora_B.dim() < 2 or lora_B.shape[2:].numel() != 1:
        raise CheckpointError(f"{path}: the factors of {name} are no low-rank pair: {shapes}")
    if lora_A.shape[0] != lora_B.shape[1] or 0 in lora_A.shape or 0 in lora_B.shape:
        raise CheckpointError(f"{path}: the factors of {name} have no common rank: {shapes}{_said_of_groups(lora_A, lora_B)}")
    if lora_A.dim() != lora_B.dim():
        repairs.append(f"{name}: factors of different dimensions: {shapes}")
        lora_B = lora_B.reshape(*lora_B.shape[:2], *[1] * (lora_A.dim() - 2))
    return lora_A, lora_B


def _said_of_groups(lora_A: Tensor, lora_B: Tensor) -> str:
    """The end of an error's sentence for factors of a convolution with groups by peft: "" for others.

    Its A reaches over all inputs and its B is in groups, (out, rank / groups, 1, 1), which is no product of two matrices.
    """
    groups, rest = divmod(lora_A.shape[0], lora_B.shape[1] or 1)
    of_groups = lora_A.dim() > 2 and groups > 1 and not rest
    return f", as peft's of a convolution with {groups} groups, which are not read here" if of_groups else ""


def _stored_alpha(tensors: Mapping[str, Tensor], rank: int, name: str, path: Path, repairs: list[str]) -> float:
    said = next((part for part in ("scale", "alpha") if part in tensors), None)  # in A1111's order
    if said is None:
        return float(rank)
    if tensors[said].numel() != 1:
        raise CheckpointError(f"{path}: {said} of {name} is {tuple(tensors[said].shape)}, not one number")
    alpha = tensors[said].float().item()
    if said == "scale":
        return alpha * rank
    if alpha == 0:
        repairs.append(f"{name}: alpha 0 read as alpha = rank, as kohya's trainer means it")
    return alpha or float(rank)


def _magnitude(magnitude: Tensor | None, out_size: int, name: str, path: Path, of_peft: bool) -> Tensor | None:
    if magnitude is None:
        return None
    shapes = {(out_size, *[1] * ones) for ones in range(4)}
    if of_peft:
        shapes |= {(1, out_size, 1), (1, out_size, 1, 1)}
    if tuple(magnitude.shape) not in shapes:
        raise CheckpointError(
            f"{path}: the DoRA magnitude of {name} is {tuple(magnitude.shape)}; one number for each of its {out_size} "
            "outputs is needed (LyCORIS' magnitudes of inputs are another method)"
        )
    return magnitude.reshape(out_size)
