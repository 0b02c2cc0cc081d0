"""The residual block, the changes of resolution and what stands between two of them, all shape (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xdiffusion.layers.convolution import Conv3x3

MAX_RES_BLOCKS = 64  # per level of a network; a stranger's config could ask for any number


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))), time))), the time entering between the convolutions.

    Args:
        in_channels, out_channels: a 1x1 convolution carries x across where they differ.
        time_dim: width of the time embedding; None for a block without time (the autoencoder's).
        time_conditioning: "scale_shift" modulates the second norm, norm(h) * (1 + scale) + shift ([iDDPM] section 3.4,
            [ADM]); "add" adds a projection of the time to h ([DDPM], Stable Diffusion).
        norm_groups, norm_eps: of the GroupNorms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int | None,
        time_conditioning: Literal["scale_shift", "add"] = "scale_shift",
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.time_conditioning = time_conditioning
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        if time_dim is not None:
            width = 2 * out_channels if time_conditioning == "scale_shift" else out_channels
            self.time_emb_proj = nn.Linear(time_dim, width)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B D"] | None = None) -> Float[Tensor, "B E H W"]:
        h = self.conv1(F.silu(self.norm1(x)))
        if time is None:
            h = self.norm2(h)
        elif self.time_conditioning == "scale_shift":
            scale, shift = self.time_emb_proj(F.silu(time))[:, :, None, None].chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + self.time_emb_proj(F.silu(time))[:, :, None, None])
        return self.conv_shortcut(x) + self.conv2(F.silu(h))


class Downsample(nn.Module):
    """Half the resolution, rounded up: a strided convolution, or 2x2 average pooling."""

    def __init__(self, channels: int, kind: Literal["conv", "resample"] = "conv"):
        super().__init__()
        self.conv = Conv3x3(channels, channels, stride=2) if kind == "conv" else nn.AvgPool2d(2, ceil_mode=True)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Resize to `size` by nearest neighbour, then (kind "conv") a 3x3 convolution."""

    def __init__(self, channels: int, kind: Literal["conv", "resample"] = "conv"):
        super().__init__()
        self.conv = Conv3x3(channels, channels) if kind == "conv" else nn.Identity()

    def forward(self, x: Float[Tensor, "B C h w"], size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, the attention behind each, and the step to the next resolution."""

    def __init__(
        self,
        resnets: Sequence[ResBlock],
        attentions: Sequence[nn.Module] = (),
        *,
        downsample: nn.Module | None = None,
        upsample: Upsample | None = None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsample = downsample
        self.upsample = upsample

    def stage(self, i: int, h: Tensor, time: Tensor | None = None, *context: Tensor) -> Tensor:
        """Residual block i, and the attention behind it if it has one."""
        h = self.resnets[i](h, time)
        return self.attentions[i](h, *context) if i < len(self.attentions) else h
