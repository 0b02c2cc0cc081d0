"""Transformer blocks on the pixels of a feature map: self-attention, cross-attention to the text, feed-forward."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from xdiffusion.layers.attention import Attention


class FeedForward(nn.Module):
    """GEGLU and a projection back: (a * gelu(g)) W_out with [a, g] = x W_in ([GLU] section 2)."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * mult * dim)
        self.proj_out = nn.Linear(mult * dim, dim)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Pre-norm residual self-attention (attn1), cross-attention to the context (attn2) and feed-forward (ff).

    Args:
        dim: token width.
        context_dim: width of the context.
        num_heads: of both attentions.
        ff_mult: hidden width of the feed-forward over dim; 0 leaves the feed-forward out.
        qk_norm: see `Attention`.
    """

    def __init__(self, dim: int, *, context_dim: int, num_heads: int, ff_mult: int = 4, qk_norm: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads=num_heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim=context_dim, num_heads=num_heads, qk_norm=qk_norm)
        self.norm3 = nn.LayerNorm(dim) if ff_mult else None
        self.ff = FeedForward(dim, ff_mult) if ff_mult else None

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L E"]) -> Float[Tensor, "B N D"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        if self.ff is not None:
            x = x + self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """Transformer blocks with the pixels as tokens: x + proj_out(blocks(proj_in(norm(x)))) ([LDM] appendix E.2.1).

    Args:
        channels: of the feature map.
        depth: number of transformer blocks.
        projection: of proj_in and proj_out: "conv" (1x1, Stable Diffusion 1.x), "linear" (2.x; the same mathematics, but
            checkpoints hold shapes), or "none": blocks(x) alone, so that the blocks write into x itself.
        norm_groups: of the GroupNorm.
        context_dim, num_heads, ff_mult, qk_norm: see `TransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        *,
        depth: int,
        context_dim: int,
        num_heads: int,
        ff_mult: int = 4,
        projection: Literal["conv", "linear", "none"] = "linear",
        norm_groups: int = 32,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.projection = projection
        make_projection = {
            "conv": lambda: nn.Conv2d(channels, channels, 1),
            "linear": lambda: nn.Linear(channels, channels),
        }
        if projection != "none":
            self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
            self.proj_in = make_projection[projection]()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim=context_dim, num_heads=num_heads, ff_mult=ff_mult, qk_norm=qk_norm)
            for _ in range(depth)
        )
        if projection != "none":
            self.proj_out = make_projection[projection]()

    def forward(self, x: Float[Tensor, "B C H W"], context: Float[Tensor, "B L E"]) -> Float[Tensor, "B C H W"]:
        if self.projection == "none":
            return self._transform(x, context)
        h = self.norm(x)
        if self.projection == "conv":
            return x + self.proj_out(self._transform(self.proj_in(h), context))
        return x + self._transform(h, context, self.proj_in, self.proj_out)

    def _transform(
        self,
        x: Float[Tensor, "B C H W"],
        context: Float[Tensor, "B L E"],
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Pixels to tokens, the blocks (between linear projections), tokens to pixels, in x's memory layout."""
        tokens = rearrange(x, "b c h w -> b (h w) c")  # free of copies in channels_last memory, as is the way back
        if before is not None:
            # of a view torch's sum depends on whether the weight is trained: a LoRA's base would not be the base to the bit
            tokens = before(tokens.contiguous())
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if after is not None:
            tokens = after(tokens)
        h = rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
        # one layout throughout: convolutions on a mixture of layouts cost a third more
        return h.contiguous() if x.is_contiguous() else h
