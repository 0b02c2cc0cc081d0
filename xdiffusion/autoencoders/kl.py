"""Stable Diffusion's autoencoder: images to latents with an eighth of the side ([LDM] section 3.1 and appendix G).

    q(z | x) = N(mean(x), exp(logvar(x)))     latents = scale_factor * z     images ~ decoder(latents / scale_factor)

A small KL penalty towards N(0, 1) kept the latents bounded while it was trained; `scale_factor` brings them to unit
variance, and nothing outside this file knows of it. Submodule names follow the diffusers library's, without the list
indices of one-element lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from xdiffusion.layers.attention import Attention
from xdiffusion.layers.resnet import MAX_RES_BLOCKS, Level, ResBlock, Upsample

LOGVAR_RANGE = (-30.0, 20.0)
PIXELS_AT_A_TIME = 512 * 512  # decoding as many takes 1 GB, which a card that draws or trains at 512 has, but not 8


class KLAutoencoder(nn.Module):
    """encode: images (B, C, H, W) in [-1, 1] -> latents (B, latent_channels, H / p, W / p) of about unit variance.

    A batch is coded in slices of no more than PIXELS_AT_A_TIME, or of one image, which changes no number. For large images,
    set on the object: `tile_size`, the side in pixels of overlapping square tiles that are coded one at a time and blended
    (None: whole images). A tile sees nothing of the image around it, so tiles differ a little from the whole.

    Args:
        channels: of the images; read off the data set.
        widths: feature width of each level; the resolution halves from one level to the next.
        num_res_blocks: residual blocks per level of the encoder (one more in the decoder).
        latent_channels: of the latents.
        scale_factor: one over the standard deviation of z over the training images.
        norm_groups: of all GroupNorms.

    Raises:
        ValueError: for widths that norm_groups does not divide, and (on call) an image whose sides pixels_per_latent does
            not divide.
    """

    def __init__(
        self,
        channels: int,
        *,
        widths: Sequence[int] = (128, 256, 512, 512),
        num_res_blocks: int = 2,
        latent_channels: int = 4,
        scale_factor: float = 0.18215,
        norm_groups: int = 32,
    ):
        super().__init__()
        if min([norm_groups, latent_channels, num_res_blocks, *widths]) < 1:
            raise ValueError(
                f"widths={list(widths)}, norm_groups={norm_groups}, latent_channels={latent_channels} and "
                f"num_res_blocks={num_res_blocks} must be at least 1"
            )
        for width in widths:
            if width % norm_groups:
                raise ValueError(f"norm_groups={norm_groups} does not divide the level width {width}")
        if not widths or num_res_blocks > MAX_RES_BLOCKS:
            raise ValueError(
                f"widths={list(widths)} must name a level, num_res_blocks={num_res_blocks} be at most {MAX_RES_BLOCKS}"
            )
        self.pixels_per_latent = 2 ** (len(widths) - 1)
        self.latent_channels = latent_channels
        self.scale_factor = scale_factor
        self.tile_size: int | None = None
        self.encoder = _Encoder(channels, widths, num_res_blocks, 2 * latent_channels, norm_groups)
        self.decoder = _Decoder(channels, widths, num_res_blocks, latent_channels, norm_groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None = None) -> Float[Tensor, "B E h w"]:
        """The mean of the latents, or, with a generator, a draw from their distribution."""
        mean, std = self.posterior(images)
        if generator is None:
            return mean
        eps = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
        return mean + std * eps.to(mean.device)

    def decode(self, latents: Float[Tensor, "B E h w"]) -> Float[Tensor, "B C H W"]:
        """Images of about [-1, 1]."""
        z = latents.to(self.post_quant_conv.weight.dtype) / self.scale_factor
        p = self.pixels_per_latent
        tile = self.tile_size and max(1, self.tile_size // p)
        return self._piecewise(lambda piece: self.decoder(self.post_quant_conv(piece)), z, tile, 1, p)

    def posterior(self, images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B E h w"], Float[Tensor, "B E h w"]]:
        """(mean, std) of the latents, scale factor included."""
        p = self.pixels_per_latent
        if images.shape[-1] % p or images.shape[-2] % p:
            raise ValueError(f"the sides of an image must be multiples of {p}, not {tuple(images.shape[-2:])}")
        images = images.to(self.quant_conv.weight.dtype)
        tile = self.tile_size and max(1, self.tile_size // p) * p
        moments = self._piecewise(lambda piece: self.quant_conv(self.encoder(piece)), images, tile, p, 1)
        mean, logvar = moments.chunk(2, dim=1)
        return self.scale_factor * mean, self.scale_factor * (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp()

    def _piecewise(self, code: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, unit: int, growth: int) -> Tensor:
        pixels = x.shape[2] * x.shape[3] * growth**2
        pieces = x.split(max(1, PIXELS_AT_A_TIME // pixels))
        if tile is None or max(x.shape[-2:]) <= tile:
            return torch.cat([code(piece) for piece in pieces])
        return torch.cat([_blended_tiles(code, piece, tile, unit, growth) for piece in pieces])


class _Encoder(nn.Module):
    """images (B, C, H, W) -> (B, 2 E, h, w), on the way down."""

    def __init__(self, channels: int, widths: Sequence[int], num_res_blocks: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        inputs = [widths[0], *widths[:-1]]
        for i, (width_in, width) in enumerate(zip(inputs, widths)):
            last = i == len(widths) - 1
            resnets = _resnets([width_in] + [width] * num_res_blocks, norm_groups)
            self.down_blocks.append(_Level(resnets, downsample=None if last else _Downsample(width)))
        self.mid_block = _middle(widths[-1], norm_groups)
        self.conv_norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E h w"]:
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class _Decoder(nn.Module):
    """z (B, E, h, w) -> images (B, C, H, W), on the way up."""

    def __init__(self, channels: int, widths: Sequence[int], num_res_blocks: int, in_channels: int, norm_groups: int):
        super().__init__()
        widths = list(reversed(widths))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = _middle(widths[0], norm_groups)
        self.up_blocks = nn.ModuleList()
        inputs = [widths[0], *widths[:-1]]
        for i, (width_in, width) in enumerate(zip(inputs, widths)):
            last = i == len(widths) - 1
            resnets = _resnets([width_in] + [width] * (num_res_blocks + 1), norm_groups)
            self.up_blocks.append(_Level(resnets, upsample=None if last else Upsample(width)))
        self.conv_norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "B E h w"]) -> Float[Tensor, "B C H W"]:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class _Level(Level):
    """Called as a whole, to the step to the next resolution."""

    def forward(self, h: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E h w"]:
        for i in range(len(self.resnets)):
            h = self.stage(i, h)
        if self.downsample is not None:
            h = self.downsample(h)
        if self.upsample is not None:
            h = self.upsample(h, (2 * h.shape[2], 2 * h.shape[3]))
        return h


class _PixelAttention(Attention):
    """x + attention(norm(x)) with the pixels as tokens and one head."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__(channels, num_heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        tokens = super().forward(rearrange(self.group_norm(x), "b c h w -> b (h w) c"))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


class _Downsample(nn.Module):
    """Half the resolution by a strided convolution that is padded at the right and the bottom alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _resnets(widths: Sequence[int], norm_groups: int) -> list[ResBlock]:
    pairs = zip(widths[:-1], widths[1:])
    return [ResBlock(a, b, time_dim=None, norm_groups=norm_groups, norm_eps=1e-6) for a, b in pairs]


def _middle(width: int, norm_groups: int) -> _Level:
    return _Level(_resnets([width] * 3, norm_groups), [_PixelAttention(width, norm_groups)])


def _blended_tiles(code: Callable[[Tensor], Tensor], x: Tensor, tile: int, unit: int, growth: int) -> Tensor:
    """code(x) from tiles of side `tile`, each weighted by a pyramid that falls to its edges, over the sum of the weights.

    Args:
        code: maps a tile of unit * n pixels to one of growth * n.
        x: (B, C, H, W).
        tile: a multiple of unit.
        unit: tiles begin at multiples of it.
        growth: see code.
    """
    boxes = [(top, left) for top in _starts(x.shape[2], tile, unit) for left in _starts(x.shape[3], tile, unit)]
    total = weights = None
    for top, left in boxes:
        coded = code(x[:, :, top : top + tile, left : left + tile])
        if total is None:
            height, width = (side // unit * growth for side in x.shape[2:])
            exact = torch.promote_types(coded.dtype, torch.float32)  # float16 cannot count the pixels of a tile
            total = coded.new_zeros(*coded.shape[:2], height, width, dtype=exact)
            weights = coded.new_zeros(height, width, dtype=exact)
        rows, columns = (torch.arange(1, n + 1, device=x.device) for n in coded.shape[2:])
        pyramid = torch.minimum(rows, rows.flip(0))[:, None] * torch.minimum(columns, columns.flip(0))
        row, column = (start // unit * growth for start in (top, left))
        here = (..., slice(row, row + coded.shape[2]), slice(column, column + coded.shape[3]))
        total[here] += coded * pyramid.to(exact)
        weights[here] += pyramid
    return (total / weights).to(coded.dtype)


def _starts(side: int, tile: int, unit: int) -> list[int]:
    """Where tiles begin: a quarter of a tile overlaps, and the last tile ends at the edge."""
    if side <= tile:
        return [0]
    stride = max(unit, tile * 3 // 4 // unit * unit)
    return [*range(0, side - tile, stride), side - tile]
