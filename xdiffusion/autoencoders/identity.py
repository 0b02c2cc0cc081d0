"""The autoencoder of pixel-space models: none. What the network sees is the image itself."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class IdentityAutoencoder(nn.Module):
    """encode and decode return their argument.

    Args:
        channels: of the images; read off the data set.
    """

    pixels_per_latent = 1

    def __init__(self, channels: int):
        super().__init__()
        self.latent_channels = channels

    def encode(self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None = None) -> Float[Tensor, "B C H W"]:
        return images

    def posterior(self, images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], None]:
        """(mean, std) of the latents; None, because they are certain."""
        return images, None

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return latents
