"""What an adapter learned, as linear algebra: the measurements of [LoRA] section 7 on one layer's factors.

    delta = s B A,    B: (out, rank),    A: (rank, in)

A convolution is its matrix over patches, (out, in * kernel): flatten the factors before the call. All is computed in
float64 on matrices of the rank's size; delta itself, which may be large, is never formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.lora.merge import svd_of_product


def delta_singular_values(
    lora_B: Float[Tensor, "O R"], lora_A: Float[Tensor, "R I"], scaling: float = 1.0
) -> Float[Tensor, " K"]:
    """The singular values of scaling * B A that can differ from zero, falling: K = min(O, R, I)."""
    return abs(scaling) * svd_of_product(lora_B.double(), lora_A.double())[1]


def subspace_similarity(A_1: Float[Tensor, "R1 I"], A_2: Float[Tensor, "R2 I"]) -> Float[Tensor, "K1 K2"]:
    """similarity(i, j) at [i - 1, j - 1] ([LoRA] eq. 4, there phi): how much of one top subspace lies in the other.

        similarity(i, j) = |V_1i^T V_2j|^2 / min(i, j)    V_1i: the i first right-singular vectors of A_1, as columns

    0 for orthogonal subspaces, 1 where one holds the other. Random subspaces of I dimensions have max(i, j) / I in the
    mean. K1 = min(R1, I), and K2 likewise.
    """
    V_1, V_2 = (torch.linalg.svd(A.double(), full_matrices=False).Vh for A in (A_1, A_2))
    overlaps = (V_1 @ V_2.T).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, device=A_1.device) for size in overlaps.shape)
    return overlaps / torch.minimum(i[:, None], j)


class Amplification(NamedTuple):
    """Frobenius norms: the numbers of [LoRA] table 7 for one layer.

    weight: |W|. delta: |delta|.
    in_delta: |U^T W V|, what W does in the directions of delta; U, V are delta's left and right singular vectors.
    in_random: its root mean square for random U, V of the same rank.
    in_top: its largest value of that rank, which W's own first singular vectors have.
    """

    weight: float
    delta: float
    in_delta: float
    in_random: float
    in_top: float

    @property
    def factor(self) -> float:
        """|delta| / |U^T W V|: how much louder delta makes its directions than W had them ([LoRA] section 7.3)."""
        return self.delta / self.in_delta


def amplification(
    weight: Float[Tensor, "O I"], lora_B: Float[Tensor, "O R"], lora_A: Float[Tensor, "R I"], scaling: float = 1.0
) -> Amplification:
    """Compare an update of rank K = min(O, R, I) with the weight that it is added to."""
    W = weight.double()
    U, S, Vh = svd_of_product(lora_B.double(), lora_A.double())
    return Amplification(
        weight=float(W.norm()),
        delta=abs(scaling) * float(S.norm()),
        in_delta=float((U.T @ W @ Vh.T).norm()),
        in_random=float(W.norm()) * len(S) / W.numel() ** 0.5,
        in_top=float(torch.linalg.svdvals(W)[: len(S)].norm()),
    )
