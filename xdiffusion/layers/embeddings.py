"""Embeddings of time: sinusoids of the schedule's network time, then a small perceptron."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


def sinusoidal_embedding(time: Float[Tensor, " B"], dim: int) -> Float[Tensor, "B D"]:
    """cos and sin of `time`, float32, at dim / 2 frequencies 10000^(-2i / dim), i = 0, 1, ... ([Attention] section 3.5).

    Raises:
        ValueError: if dim is odd.
    """
    if dim % 2:
        raise ValueError(f"the time embedding's width must be even, not {dim}")
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=time.device, dtype=torch.float32))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """sinusoids (B, in_dim) -> Linear -> SiLU -> Linear -> (B, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_dim = in_dim
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, time: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        sinusoids = sinusoidal_embedding(time, self.in_dim).to(self.linear_1.weight.dtype)
        return self.linear_2(self.act(self.linear_1(sinusoids)))
