"""LyCORIS' other products ([LyCORIS]), read as the LoRAs that they are: each is some B A too, of a larger rank.

    LoHa    (B1 A1) o (B2 A2)    = (B1 * B2)(A1 * A2)        o entry by entry; * Kronecker products of rows of B1 and B2, and
                                                             of columns of A1 and A2
    LoKr    (B1 A1) (x) (B2 A2)  = (B1 (x) B2)(A1 (x) A2)    (x) the Kronecker product
    LoCon   B (M A)                                          M, `lora_mid`, between the factors of a convolution

The rank is r1 r2, of LoCon r; where the weight's own is smaller, the product itself is one factor and the identity the other.
The scaling is alpha / r; of a LoKr of two whole matrices it is 1. A pair B, A of LoHa or LoKr can have its M too: t1, t2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_formats.factors import check_parts
from xdiffusion.checkpoints.lora_formats.layer_table import Shape

KEY_PARTS = r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|lora_mid\.weight"
_METHODS = {"hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon"}
_MATRICES = {  # method -> the parts that its matrices can be made of: W, or B A, or M B A
    "LoHa": [
        ("hada_w1_a hada_w1_b", "hada_w2_a hada_w2_b"),
        ("hada_t1 hada_w1_a hada_w1_b", "hada_t2 hada_w2_a hada_w2_b"),
    ],
    "LoKr": [
        (w1, w2)
        for w1 in ("lokr_w1", "lokr_w1_a lokr_w1_b")
        for w2 in ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_t2 lokr_w2_a lokr_w2_b")
    ],
    "LoCon": [("lora_mid lora_B lora_A",)],
}
_BESIDE = ("alpha", "scale", "magnitude")  # the matrices
_Pair = tuple[Tensor, Tensor]  # B (out, r), A (r, in * kernel)


def method_of(parts: Mapping[str, Tensor]) -> str | None:
    """The method of a module; None for LoRA."""
    return next((method for prefix, method in _METHODS.items() if any(p.startswith(prefix) for p in parts)), None)


def as_lora(parts: Mapping[str, Tensor], shapes: Collection[Shape], name: str, path: Path) -> dict[str, Tensor]:
    """The parts of the LoRA of the same update, its factors in float32.

    Args:
        parts: of one module, whose `method_of` is not None.
        shapes: of the weights that it may be for. No other product is formed: a few numbers can claim a huge one.
        name, path: of the module and the file, for messages.

    Raises:
        CheckpointError: if parts are missing or do not go together, or the update is of none of the weights.
    """
    method = method_of(parts)
    check_parts(parts, name, path)
    made_of = parts.keys() - set(_BESIDE)
    words = next((words for words in _MATRICES[method] if made_of == set(" ".join(words).split())), None)
    if words is None:
        raise CheckpointError(f"{path}: {name} is no whole {method}, it has {', '.join(sorted(parts))}")
    matrices = [[parts[part].float() for part in word.split()] for word in words]
    if method == "LoCon":
        matrices = [[middle, up.flatten(1).T, down.flatten(1)] for middle, up, down in matrices]
    size = _size(method, matrices)
    shape = next((shape for shape in shapes if (shape[0], prod(shape[1:])) == size), None)
    if shape is None:
        given = ", ".join(f"{part} {tuple(parts[part].shape)}" for part in sorted(made_of))
        wanted = " or ".join(str(shape) for shape in shapes)
        raise CheckpointError(f"{path}: {name} has weight {wanted}, which the {method} of the file does not fit: {given}")
    lora_B, lora_A = _product(method, [_pair(matrix) for matrix in matrices])
    rank = lora_A.shape[0]
    lora = {
        "lora_A": lora_A.reshape(rank, *shape[1:]),
        "lora_B": lora_B.reshape(*lora_B.shape, *[1] * (len(shape) - 2)),
    }
    lora |= {part: parts[part] for part in _BESIDE if part in parts}
    ranks = [matrix[-1].shape[0] for matrix in matrices if len(matrix) > 1]
    if not ranks:
        lora.pop("alpha", None)
    elif "alpha" in lora:
        lora["alpha"] = lora["alpha"].float() * (rank / ranks[0])
    return lora


def _size(method: str, matrices: Sequence[Sequence[Tensor]]) -> tuple[int, ...] | None:
    """(out, in * kernel) of the product; None if the parts do not go together."""
    sizes = [_matrix_size(matrix) for matrix in matrices]
    if None in sizes or (method == "LoHa" and sizes[0] != sizes[1]):
        return None
    return tuple(map(prod, zip(*sizes))) if method == "LoKr" else sizes[0]


def _matrix_size(matrix: Sequence[Tensor]) -> tuple[int, int] | None:
    if any(tensor.dim() < 2 or 0 in tensor.shape for tensor in matrix):
        return None
    if len(matrix) == 1:
        return matrix[0].shape[0], prod(matrix[0].shape[1:])
    *middle, B, A = matrix
    if not middle:
        return (B.shape[0], prod(A.shape[1:])) if B.dim() == 2 and B.shape[1] == A.shape[0] else None
    (M,) = middle
    fits = B.dim() == A.dim() == 2 and M.shape[:2] == (B.shape[0], A.shape[0])
    return (B.shape[1], A.shape[1] * prod(M.shape[2:])) if fits else None


def _pair(matrix: Sequence[Tensor]) -> _Pair:
    if len(matrix) == 1:
        return _beside_identity(matrix[0].flatten(1))
    *middle, B, A = matrix
    if not middle:
        return B, A.flatten(1)
    (M,) = middle
    if B.shape[0] > B.shape[1]:  # a rank above that of the weight: its rows first, so that nothing outgrows the weight
        return _beside_identity(torch.einsum("mn...,mo,ni->oi...", M, B, A).flatten(1))
    return B.T, torch.einsum("mn...,ni->mi...", M, A).flatten(1)


def _beside_identity(W: Tensor) -> _Pair:
    identity = torch.eye(min(W.shape))
    return (identity, W) if W.shape[0] < W.shape[1] else (W, identity)


def _product(method: str, pairs: Sequence[_Pair]) -> _Pair:
    if method == "LoCon":
        return pairs[0]
    (B1, A1), (B2, A2) = pairs
    rank = A1.shape[0] * A2.shape[0]
    if method == "LoHa":
        if rank > min(B1.shape[0], A1.shape[1]):
            return _beside_identity((B1 @ A1) * (B2 @ A2))
        return (B1[:, :, None] * B2[:, None, :]).flatten(1), (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)
    if rank > min(B1.shape[0] * B2.shape[0], A1.shape[1] * A2.shape[1]):
        return _beside_identity(_kronecker(B1 @ A1, B2 @ A2))
    return _kronecker(B1, B2), _kronecker(A1, A2)


def _kronecker(X: Tensor, Y: Tensor) -> Tensor:
    """torch.kron, which fails on some strides of lengths of 1."""
    return (X[:, None, :, None] * Y[None, :, None, :]).flatten(2).flatten(0, 1)
