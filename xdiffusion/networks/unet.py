"""The UNet ([DDPM] appendix B, [ADM], [LDM]): from a 1 M-parameter digit model to Stable Diffusion by arguments.

    pixels -> conv_in -> [resnets (+ transformers), downsample] x levels -> middle -> [the same, upsample] x levels -> conv_out

Each level keeps its resolution; what it computes on the way down is concatenated on the way up. Submodule names follow
the diffusers library's, the names under which the field publishes weights and LoRA files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xdiffusion.layers.embeddings import TimeEmbedding
from xdiffusion.layers.resnet import MAX_RES_BLOCKS, Downsample, Level, ResBlock, Upsample
from xdiffusion.layers.transformer import SpatialTransformer


class UNet(nn.Module):
    """(xt, time, context) -> prediction of xt's shape.

    Args:
        in_channels: channels of xt; read off the autoencoder or the data set.
        context_dim: width of the text embedding; read off the text encoder.
        out_channels: of the prediction; None means in_channels.
        channels: feature width of each level; the resolution halves from one level to the next.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        transformer_depth: transformer blocks behind each residual block, per level; 0 means no attention there. The
            middle has max(1, the last level's depth).
        head_dim: width of an attention head. Give either this or num_heads.
        num_heads: attention heads, the same at every level.
        patch_size: pixels per side folded into channels before the first convolution (1 = none).
        ff_mult: hidden width of the transformers' feed-forward over their width; 0 = none.
        projection: "linear", "conv" or "none", see `SpatialTransformer`.
        time_conditioning: "scale_shift" or "add", see `ResBlock`.
        resample: "conv" or "resample" for the changes of resolution.
        norm_groups: of all GroupNorms.
        qk_norm: see `Attention`.

    Raises:
        ValueError: for level lists of different lengths, both or neither of head_dim and num_heads, widths that heads or
            groups do not divide, and (on call) an image whose side patch_size does not divide.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        context_dim: int,
        out_channels: int | None = None,
        channels: Sequence[int] = (64, 128, 256),
        num_res_blocks: int = 2,
        transformer_depth: Sequence[int] = (0, 1, 1),
        head_dim: int | None = None,
        num_heads: int | None = None,
        patch_size: int = 1,
        ff_mult: int = 4,
        projection: Literal["linear", "conv", "none"] = "linear",
        time_conditioning: Literal["scale_shift", "add"] = "scale_shift",
        resample: Literal["conv", "resample"] = "conv",
        norm_groups: int = 32,
        qk_norm: bool = False,
    ):
        super().__init__()
        if not 1 <= num_res_blocks <= MAX_RES_BLOCKS:
            raise ValueError(f"num_res_blocks={num_res_blocks} must be in 1..{MAX_RES_BLOCKS}")
        if patch_size < 1 or ff_mult < 0:
            raise ValueError(f"patch_size={patch_size} must be at least 1, ff_mult={ff_mult} at least 0")
        _check_widths(channels, transformer_depth, head_dim, num_heads, norm_groups)
        self.patch_size = patch_size
        self.gradient_checkpointing = False
        time_dim = 4 * channels[0]

        def resnet(width_in: int, width_out: int) -> ResBlock:
            return ResBlock(
                width_in, width_out, time_dim=time_dim, time_conditioning=time_conditioning, norm_groups=norm_groups
            )

        def transformer(width: int, depth: int) -> SpatialTransformer:
            return SpatialTransformer(
                width,
                depth=depth,
                context_dim=context_dim,
                num_heads=num_heads or width // head_dim,
                ff_mult=ff_mult,
                projection=projection,
                norm_groups=norm_groups,
                qk_norm=qk_norm,
            )

        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], time_dim)

        levels = list(zip(channels, transformer_depth))
        skip_widths = [channels[0]]
        width = channels[0]
        self.down_blocks = nn.ModuleList()
        for i, (level_width, depth) in enumerate(levels):
            last = i == len(levels) - 1
            resnets = [resnet(width_in, level_width) for width_in in [width] + [level_width] * (num_res_blocks - 1)]
            width = level_width
            attentions = [transformer(level_width, depth) for _ in resnets if depth]
            self.down_blocks.append(Level(resnets, attentions, downsample=None if last else Downsample(width, resample)))
            skip_widths += [level_width] * (num_res_blocks + (not last))

        self.mid_block = Level(
            [resnet(width, width), resnet(width, width)], [transformer(width, max(1, transformer_depth[-1]))]
        )

        self.up_blocks = nn.ModuleList()
        for i, (level_width, depth) in enumerate(reversed(levels)):
            resnets = []
            for _ in range(num_res_blocks + 1):
                resnets.append(resnet(width + skip_widths.pop(), level_width))
                width = level_width
            attentions = [transformer(level_width, depth) for _ in resnets if depth]
            last = i == len(levels) - 1
            self.up_blocks.append(Level(resnets, attentions, upsample=None if last else Upsample(width, resample)))

        self.conv_norm_out = nn.GroupNorm(norm_groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, (out_channels or in_channels) * patch_size**2, 3, padding=1)
        self._zero_residual_branches()

    def _zero_residual_branches(self) -> None:
        """Start each residual block as the identity and the prediction at zero ([ADM] reference implementation)."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self, xt: Float[Tensor, "B C H W"], time: Float[Tensor, " B"], context: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B E H W"]:
        if xt.shape[-1] % self.patch_size or xt.shape[-2] % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide the image size {tuple(xt.shape[-2:])}")
        time = self.time_embedding(time)
        h = F.pixel_unshuffle(xt, self.patch_size) if self.patch_size > 1 else xt
        h = self.conv_in(h.to(self.conv_in.weight.dtype).contiguous(memory_format=_layout(self.conv_in.weight)))

        skips = [h]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                h = self._stage(level, i, h, time, context)
                skips.append(h)
            if level.downsample is not None:
                h = level.downsample(h)
                skips.append(h)

        h = self._stage(self.mid_block, 0, h, time, context)
        h = self._stage(self.mid_block, 1, h, time, context)

        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                h = torch.cat([h, skips.pop()], dim=1)  # h again: the narrower one must not live through the stage
                h = self._stage(level, i, h, time, context)
            if level.upsample is not None:
                h = level.upsample(h, skips[-1].shape[2:])

        h = self.conv_out(F.silu(self.conv_norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h

    def blocks(self) -> list[nn.Module]:
        """The modules with nearly all of the weights, each called as a whole; sharded weights are gathered one by one."""
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        parts = (m for level in levels for m in (*level.resnets, *level.attentions, level.downsample, level.upsample))
        return [part for part in parts if part is not None and any(True for _ in part.parameters())]

    def _stage(self, level: Level, i: int, h: Tensor, time: Tensor, context: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(level.stage, i, h, time, context, use_reentrant=False)
        return level.stage(i, h, time, context)


def _layout(weight: Tensor) -> torch.memory_format:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _check_widths(channels, transformer_depth, head_dim, num_heads, norm_groups) -> None:
    if not channels or len(channels) != len(transformer_depth):
        raise ValueError(f"channels={list(channels)} and transformer_depth={list(transformer_depth)} must be of one length")
    if (head_dim is None) == (num_heads is None):
        raise ValueError(f"give either head_dim or num_heads, not head_dim={head_dim} and num_heads={num_heads}")
    heads = {"head_dim": head_dim} if num_heads is None else {"num_heads": num_heads}
    for name, value in (heads | {"norm_groups": norm_groups, "channels": min(channels)}).items():
        if value < 1:
            raise ValueError(f"{name}={list(channels) if name == 'channels' else value} must be at least 1")
    if channels[0] % 2:
        raise ValueError(f"channels={list(channels)}: the first width must be even, as the time embedding has it")
    if min(transformer_depth) < 0:
        raise ValueError(f"transformer_depth={list(transformer_depth)} must be at least 0")
    for width in channels:
        if width % (head_dim or num_heads):
            raise ValueError(f"{'head_dim' if head_dim else 'num_heads'}={head_dim or num_heads} does not divide {width}")
        if width % norm_groups:
            raise ValueError(f"norm_groups={norm_groups} does not divide the level width {width}")
