"""Multi-head attention: one block for the UNet's self- and cross-attention, the text encoder and the autoencoder.

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V,    Q = x W_q,  K = c W_k,  V = c W_v       ([Attention] eq. 1)

with c = x for self-attention and c = the text embedding for cross-attention.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Project, attend per head, project back.

    Args:
        dim: width of x and of the output.
        context_dim: width of the cross-attention context; None for self-attention.
        num_heads: must divide dim.
        qkv_bias: whether q, k and v have biases (CLIP and the autoencoder: yes; UNets: no).
        qk_norm: layer-normalise queries and keys per head, with a learned gain, for stability at high learning rates
            ([ViT22B] section 2).
        causal: each token sees itself and earlier tokens only (CLIP's text transformer).

    Raises:
        ValueError: if num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        num_heads: int,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        causal: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the attention width {dim}")
        self.num_heads = num_heads
        self.causal = causal
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=qkv_bias)
        self.to_out = nn.Linear(dim, dim)
        self.norm_q = nn.LayerNorm(dim // num_heads, bias=False) if qk_norm else None
        self.norm_k = nn.LayerNorm(dim // num_heads, bias=False) if qk_norm else None
        self._cache: _ContextCache | None = None

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L E"] | None = None) -> Float[Tensor, "B N D"]:
        query = self._heads(self.norm_q, self.to_q(x))
        key, value = self._keys_values(x) if context is None else self._context_keys_values(context)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.norm_k, self.to_k(source)), self._heads(None, self.to_v(source))

    def _context_keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        if self._cache is None:
            return self._keys_values(context)
        if self._cache.context is not context:
            self._cache.context, self._cache.keys_values = context, self._keys_values(context)
        return self._cache.keys_values

    def keep_results(self) -> None:
        """Project an unchanged context once, see `computed_once`."""
        self._cache = _ContextCache()

    def drop_results(self) -> None:
        self._cache = None

    def _heads(self, norm: nn.Module | None, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B heads N head_dim"]:
        x = x.unflatten(2, (self.num_heads, -1))
        return (x if norm is None else norm(x)).transpose(1, 2)


class _ContextCache:
    """Keys and values of the last context tensor seen (the same object, not an equal one)."""

    context: Tensor | None = None
    keys_values: tuple[Tensor, Tensor] | None = None
