"""A diffusion model as a whole: its built parts, and the way from prompts to images.

images = autoencoder.decode(sampler(denoiser(network, schedule, prediction), noise, times))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xdiffusion.diffusion.denoiser import Denoiser, GuidedDenoiser
from xdiffusion.diffusion.predictions import Prediction
from xdiffusion.diffusion.schedules import Schedule
from xdiffusion.layers.attention import cached_context
from xdiffusion.samplers.contract import OnStep

Sampler = Callable[..., Tensor]


@dataclass(frozen=True)
class SamplingSettings:
    """The `sampling:` section of a config, beside its sampler and its time grid.

    steps: of the sampler.
    cfg_scale: strength of classifier-free guidance; 1 is none.
    clip_x0: clamp each estimate of x0 to [-1, 1]; for pixel-space models.
    """

    steps: int = 50
    cfg_scale: float = 2.0
    clip_x0: bool = True


class DiffusionModel(nn.Module):
    """The parts of one model; its state dict is what a checkpoint holds.

    Args:
        network: `(xt, time, context) -> prediction`.
        text_encoder: `encode(prompts) -> context`.
        autoencoder: between images and what the network denoises.
        schedule, prediction: the diffusion process and what the network outputs.
        image_shape: (C, H, W) of the images.
        channels_last: keep the network's convolutions in NHWC memory; faster, the same mathematics.

    Raises:
        ValueError: if the network's patches do not divide the image.
    """

    def __init__(
        self,
        network: nn.Module,
        text_encoder: nn.Module,
        autoencoder: nn.Module,
        schedule: Schedule,
        prediction: Prediction,
        image_shape: tuple[int, int, int],
        channels_last: bool = True,
    ):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last) if channels_last else network
        self.text_encoder = text_encoder
        self.autoencoder = autoencoder
        self.schedule = schedule
        self.prediction = prediction
        self.image_shape = tuple(image_shape)
        _, height, width = self.latent_shape
        if height % network.patch_size or width % network.patch_size:
            raise ValueError(f"patch_size={network.patch_size} does not divide the image size {height}x{width}")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises."""
        _, height, width = self.image_shape
        factor = self.autoencoder.pixels_per_latent
        return self.autoencoder.latent_channels, height // factor, width // factor

    def base_weights(self) -> dict[str, Tensor]:
        """The model's own weights by name, without those of LoRA adapters; what the base hash is taken of."""
        return {k: v for k, v in self.state_dict().items() if ".lora_" not in k}


def best_device(force_cpu: bool = False) -> torch.device:
    """The GPU if there is one and it is not forbidden, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not force_cpu else "cpu")


def initial_noise(shape: tuple[int, int, int], generators: Sequence[torch.Generator]) -> Float[Tensor, "B C H W"]:
    """Standard normal noise, sample i from generator i, so that an image does not depend on its batch."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def generators_for(seed: int, count: int) -> list[torch.Generator]:
    """One CPU generator per image: image i of a run is that of seed + i."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    sampler: Sampler,
    times: Float[Tensor, " n"],
    cfg_scale: float = 1.0,
    clip_x0: bool = False,
    negative_prompt: str = "",
    batch_size: int = 100,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Images in [-1, 1] for the prompts, on the CPU, in blocks of batch_size.

    Args:
        model: in evaluation mode.
        prompts: one per image.
        generators: one per image; the source of its starting noise and of the sampler's.
        sampler: `(denoiser, x_T, times, *, generator, on_step) -> x0`.
        times: see `samplers.time_grids`.
        cfg_scale, clip_x0: see `GuidedDenoiser`.
        negative_prompt: what guidance leads away from.
        on_step: called as on_step(i, xt, x0) within each block.
    """
    denoiser = Denoiser(model.network, model.schedule, model.prediction)
    images = []
    for start in range(0, len(prompts), batch_size):
        block = slice(start, start + batch_size)
        context = model.text_encoder.encode(list(prompts[block]))
        null_context = model.text_encoder.encode([negative_prompt])
        guided = GuidedDenoiser(denoiser, context, null_context, cfg_scale, clip_x0)
        x_T = initial_noise(model.latent_shape, generators[block]).to(model.device)
        with cached_context(model.network):
            x0 = sampler(guided, x_T, times, generator=generators[block], on_step=on_step)
        images.append(model.autoencoder.decode(x0).clamp(-1, 1).float().cpu())
    return torch.cat(images)
