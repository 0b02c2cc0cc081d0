"""Sampling that starts from given data instead of noise ([SDEdit]), as a whole or around what a mask keeps.

    xt = alpha x0 + sigma eps at a time between data and noise, and from there on any sampler of this package.

Where a mask keeps the data, the estimate of x0 is replaced by it. With the eps that the sampling started from, a
deterministic sampler then passes exactly through alpha x0 + sigma eps there: blending after each step, without a word of
it in the samplers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xdiffusion.diffusion.schedules import Schedule
from xdiffusion.samplers.contract import BoundDenoiser


def steps_left(steps: int, strength: float) -> int:
    """How many of a grid's steps are taken: int(strength * steps), which is none at strength 0 alone.

    Raises:
        ValueError: if strength is not in [0, 1], or so small that no step is left.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} must be in [0, 1]: 0 keeps the image, 1 draws it anew")
    left = int(steps * strength)
    if strength > 0 and not left:
        digits = max(3, len(str(steps)))
        least = math.ceil(10**digits / steps) / 10**digits
        raise ValueError(
            f"strength={strength} of {steps} steps is less than one: take more steps, or at least {least:.{digits}f}"
        )
    return left


def times_from(times: Float[Tensor, " n"], strength: float) -> Float[Tensor, " m"]:
    """The last `steps_left` steps of a grid; at strength 0 its last time alone.

    Raises:
        ValueError: see `steps_left`.
    """
    steps = len(times) - 1
    return times[steps - steps_left(steps, strength) :]


def noised(
    x0: Float[Tensor, "B C H W"], eps: Float[Tensor, "B C H W"], schedule: Schedule, times: Float[Tensor, " n"]
) -> Float[Tensor, "B C H W"]:
    """xt at the first of `times`, where sampling goes on; x0 itself if no step is left."""
    if len(times) < 2:
        return x0
    alpha, sigma = schedule.alpha_sigma(times[0])
    return alpha * x0 + sigma * eps


@dataclass(frozen=True)
class StartImage:
    """What sampling starts from instead of noise alone.

    images: (1 or B, C, H, W) in [-1, 1], of the model's image_shape.
    strength: share of the steps that are taken, in [0, 1]: 0 gives the image back; 1 with a mask starts from noise alone where
        that draws anew, as diffusers' inpainting does, and without one from the image under all the noise, as their img2img.
    mask: (1 or B, 1, H, W), 1 where the image is drawn anew, 0 where it stays; None draws it anew everywhere.
    keep_pixels: where it stays, give the image's own pixels back, not those of its latents, which the autoencoder changes.
    """

    images: Float[Tensor, "B C H W"]
    strength: float = 0.8
    mask: Float[Tensor, "N 1 _ _"] | None = None  # `check` compares its size
    keep_pixels: bool = True

    def check(self, image_shape: tuple[int, int, int], latent_shape: tuple[int, int, int]) -> None:
        """See that the images and the mask are of a model's size, and that the mask selects something of its latents.

        Raises:
            ValueError: if they are not, or it does not.
        """
        (channels, height, width), (_, h, w) = image_shape, latent_shape
        if tuple(self.images.shape[1:]) != (channels, height, width):
            raise ValueError(f"the start image has shape {tuple(self.images.shape[1:])}, the model {image_shape}")
        if self.mask is not None and tuple(self.mask.shape[1:]) != (1, height, width):
            raise ValueError(f"the mask is {tuple(self.mask.shape[2:])} pixels, the image {(height, width)}")
        if (mask := self.latent_mask(latent_shape)) is not None and not (mask > 0.5).flatten(1).any(1).all():
            raise ValueError(
                f"the mask selects nothing of the latents ({h}x{w}), so nothing would be drawn anew: it must be bright over "
                f"at least {height // h}x{width // w} of the image's {height}x{width} pixels"
            )

    def latent_mask(self, latent_shape: tuple[int, int, int]) -> Float[Tensor, "N 1 h w"] | None:
        """The mask at the size of what the network denoises, by nearest pixels."""
        return None if self.mask is None else F.interpolate(self.mask.float(), size=latent_shape[1:])

    def rows(self, block: slice, count: int) -> StartImage:
        """What belongs to a block of the `count` images that are drawn; a ValueError where there are neither 1 nor `count`."""
        given = {name: rows for name in ("images", "mask") if (rows := getattr(self, name)) is not None}
        if wrong := {len(rows) for rows in given.values()} - {1, count}:
            raise ValueError(f"{min(wrong)} start images or masks, not 1 nor {count}, the number of prompts")
        return replace(self, **{name: rows.expand(count, -1, -1, -1)[block] for name, rows in given.items()})

    def with_kept_pixels(self, drawn: Float[Tensor, "B C H W"], latent_shape: tuple[int, int, int]) -> Float[Tensor, "B C H W"]:
        """Drawn images on this one: as they are where the latents are drawn anew, over to its own pixels within the width of
        two latents, where the decoder has made both alike, and its own from there on."""
        mask, reach = self.latent_mask(latent_shape), drawn.shape[-1] // latent_shape[-1]
        if mask is None or not self.keep_pixels or reach == 1:  # of pixels themselves the denoiser has kept them
            return drawn
        window = {"kernel_size": 2 * reach + 1, "stride": 1}
        anew = F.interpolate((mask > 0.5).float(), size=drawn.shape[-2:])
        wider = F.max_pool2d(anew, padding=reach, **window)
        weight = F.avg_pool2d(F.pad(wider, [reach] * 4, mode="replicate"), **window)
        return torch.lerp(self.images.to(drawn), drawn, weight)


class MaskedDenoiser:
    """A denoiser that knows a part of the data.

    Args:
        denoiser: `(xt, t) -> x0`, with `.schedule`.
        x0: the known data.
        mask: (1 or B, 1, H, W): 1 where data are to be drawn, 0 where x0 stays.
    """

    def __init__(self, denoiser: BoundDenoiser, x0: Float[Tensor, "B C H W"], mask: Float[Tensor, "N 1 H W"]):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.x0 = x0
        self.mask = mask

    def __call__(self, xt: Float[Tensor, "B C H W"], t: Float[Tensor, ""]) -> Float[Tensor, "B C H W"]:
        return self.kept(self.denoiser(xt, t))

    def kept(self, x0: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Drawn data with the known ones where the mask keeps them."""
        return torch.where(self.mask > 0.5, x0, self.x0)
