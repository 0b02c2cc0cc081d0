"""A diffusion model as a whole: its built parts, and the way from prompts to images.

images = autoencoder.decode(sampler(denoiser(network, schedule, prediction), noise, times))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xdiffusion.diffusion.denoiser import Denoiser, GuidedDenoiser
from xdiffusion.diffusion.predictions import Prediction
from xdiffusion.diffusion.schedules import Schedule
from xdiffusion.layers.computed_once import computed_once
from xdiffusion.samplers.contract import OnStep
from xdiffusion.samplers.image_to_image import MaskedDenoiser, StartImage, noised, times_from

Sampler = Callable[..., Tensor]
PIXELS_BESIDE = 512 * 512  # of images previewed or scored at a time: a card that trains at 512 has room for them
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of `mixed_precision`


@dataclass(frozen=True)
class SamplingSettings:
    """The `sampling:` section of a config, beside its sampler and its time grid; `generate` takes all but the steps from it.

    steps: of the time grid.
    cfg_scale: strength of classifier-free guidance, a finite number; 1 is none.
    clip_x0: clamp each estimate of x0 to [-1, 1]; for pixel-space models.
    negative_prompt: what guidance leads away from.
    prompt_syntax: "plain", or "weighted" for (word:1.2) and prompts of any length, see `CLIPTextEncoder.encode`.
    whole_steps: round what the network's time embedding sees, see `Denoiser`.
    start_noise: "unit": x_T = eps. "sigma": x_T = sigma eps at the first time, as [KDiff]'s Euler starts.
    """

    steps: int = 50
    cfg_scale: float = 2.0
    clip_x0: bool = True
    negative_prompt: str = ""
    prompt_syntax: Literal["plain", "weighted"] = "plain"
    whole_steps: bool = False
    start_noise: Literal["unit", "sigma"] = "unit"

    def __post_init__(self) -> None:
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale={self.cfg_scale} must be a finite number")

    @property
    def guides(self) -> bool:
        """Whether there is guidance, and so a use of the negative prompt."""
        return self.cfg_scale != 1


class ImagesNotFinite(ValueError):
    """What a model draws holds NaN or infinity."""


class DiffusionModel(nn.Module):
    """The parts of one model; its state dict is what a checkpoint holds.

    Args:
        network: `(xt, time, context) -> prediction`.
        text_encoder: `encode(prompts) -> context`.
        autoencoder: between images and what the network denoises.
        schedule, prediction: the diffusion process and what the network outputs.
        image_shape: (C, H, W) of the images.
        channels_last: keep the network's convolutions in NHWC memory; faster on a CPU, the same mathematics.

    Attributes:
        offload_to: where a part goes only while it works, and the CPU otherwise; None: all stay where they are.

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
        self.offload_to: torch.device | None = None
        self.image_shape = tuple(image_shape)
        _, height, width = self.latent_shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide the image size {height}x{width}")

    @property
    def patch_size(self) -> int:
        """What the sides of the network's input are multiples of; 1 for a network that does not say."""
        return getattr(self.network, "patch_size", 1)

    def resize(self, height: int, width: int) -> None:
        """Draw images of another size from now on.

        Raises:
            ValueError: if the sides are not multiples of what the autoencoder and the network's patches take.
        """
        unit = self.autoencoder.pixels_per_latent * self.patch_size
        if height < unit or width < unit or height % unit or width % unit:
            raise ValueError(f"height={height}, width={width}: the sides of an image must be multiples of {unit}")
        self.image_shape = (self.image_shape[0], height, width)

    def set_precision(self, dtype: torch.dtype | None) -> None:
        """Put the network and the text encoder into a dtype, None leaves them; the autoencoder's errors would be seen."""
        for part in (self.network, self.text_encoder):
            part.to(dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where samples are computed."""
        return self.offload_to or next(self.network.parameters()).device

    @contextmanager
    def at_work(self, part: nn.Module) -> Iterator[None]:
        """Within this block `part` is on the device that computes."""
        if self.offload_to is None:
            yield
            return
        part.to(self.offload_to)
        try:
            yield
        finally:
            part.to("cpu")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises."""
        _, height, width = self.image_shape
        factor = self.autoencoder.pixels_per_latent
        return self.autoencoder.latent_channels, height // factor, width // factor

    def base_weights(self) -> dict[str, Tensor]:
        """The model's own weights by name, without LoRA adapters and learned words; what the base hash is taken of."""
        added = (".lora_", ".learned_embedding")
        own = {k: v for k, v in self.state_dict().items() if not any(name in k for name in added)}
        return {k.replace("_orig_mod.", ""): v for k, v in own.items()}  # as without torch.compile around a part


def best_device(force_cpu: bool = False) -> torch.device:
    """The GPU if there is one and it is not forbidden, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not force_cpu else "cpu")


def at_a_time(model: DiffusionModel, most: int = 100) -> int:
    """The batch size where none is asked for and no gradients are needed: `most`, or fewer of large images."""
    _, height, width = model.image_shape
    return max(1, min(most, PIXELS_BESIDE // (height * width)))


def of_captions(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """`generate`'s keyword arguments with the plain prompt syntax, for captions as prompts: a bracket in one is no weight."""
    return {**sampling, "settings": replace(sampling["settings"], prompt_syntax="plain")}


def initial_noise(shape: tuple[int, int, int], generators: Sequence[torch.Generator]) -> Float[Tensor, "B C H W"]:
    """Standard normal noise, sample i from generator i, so that an image does not depend on its batch."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def generators_for(seed: int, count: int) -> list[torch.Generator]:
    """One CPU generator per image: image i of a run is that of seed + i.

    Raises:
        ValueError: for seeds that no generator takes.
    """
    if not (isinstance(seed, Integral) and -(2**63) <= seed <= 2**64 - count):
        raise ValueError(f"seed={seed}: the seeds of {count} images must be whole numbers from -2^63 to 2^64 - 1")
    return [torch.Generator().manual_seed(int(seed) + i) for i in range(count)]


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    sampler: Sampler,
    times: Float[Tensor, " n"],
    settings: SamplingSettings = SamplingSettings(),
    start_image: StartImage | None = None,
    batch_size: int = 100,
    autocast: torch.dtype | None = None,
    on_start: Callable[[Tensor], None] | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Images in [-1, 1] for the prompts, on the CPU, in blocks of at most batch_size.

    An image depends on its own prompt and noise alone, beyond rounding: prompts of other lengths are in other blocks.

    Args:
        model: in evaluation mode.
        prompts: one per image; each different one is embedded once.
        generators: one per image; the source of its starting noise and of the sampler's.
        sampler: `(denoiser, x_T, times, *, generator, on_step) -> x0`.
        times: see `samplers.time_grids`.
        settings: guidance, prompts and noise.
        start_image: what to start from; None: noise.
        autocast: what the network and the text encoder compute in; None: in their weights' precision.
        on_start, on_step: called as on_start(x_T) and on_step(i, xt, x0) within each block, whose LoRA scales are fixed.

    Raises:
        ImagesNotFinite: after the first block with such images.
        ValueError: if there is no prompt, or not one generator for each, or a start image or a prompt is wrong.
    """
    if not prompts or len(generators) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(generators)} generators: must be as many, at least one")
    if start_image is not None:
        start_image.check(model.image_shape, model.latent_shape)
        times = times_from(times, start_image.strength)
    in_half = partial(torch.autocast, model.device.type, autocast) if autocast else nullcontext
    with in_half():
        chunks, contexts = _embedded(model, prompts, settings)
    denoiser = Denoiser(model.network, model.schedule, model.prediction, settings.whole_steps)
    images = []
    for block in _blocks(chunks, batch_size):
        of = contexts[chunks[block.start]]
        context, null_context = torch.stack([of[p] for p in prompts[block]]), of.get(settings.negative_prompt)
        guided = GuidedDenoiser(denoiser, context, null_context, settings.cfg_scale, settings.clip_x0)
        rows = None if start_image is None else start_image.rows(block, len(prompts))
        guided, x_T = _started(model, rows, guided, generators[block], times, settings.start_noise)
        if on_start is not None:
            on_start(x_T)
        with model.at_work(model.network), computed_once(model.network), in_half():
            x0 = sampler(guided, x_T, times, generator=generators[block], on_step=on_step)
        if isinstance(guided, MaskedDenoiser):
            x0 = guided.kept(x0)  # a grid may end with a trace of noise
        images.append(_decoded(model, x0, drawn=block.start))
    drawn = torch.cat(images)
    return drawn if start_image is None else start_image.with_kept_pixels(drawn, model.latent_shape)


def _decoded(model: DiffusionModel, x0: Float[Tensor, "B C H W"], drawn: int) -> Float[Tensor, "B C H W"]:
    """Images, after those that are drawn already."""
    with model.at_work(model.autoencoder):
        images = model.autoencoder.decode(x0)
    if broken := int((~images.isfinite()).flatten(1).any(1).sum()):
        raise ImagesNotFinite(
            f"{broken} of the first {drawn + len(images)} images that this model draws are not finite: NaN or infinity in "
            "its weights, or numbers too large for its precision"
        )
    return images.clamp(-1, 1).float().cpu()


def _embedded(
    model: DiffusionModel, prompts: Sequence[str], settings: SamplingSettings
) -> tuple[list[int], dict[int, dict[str, Float[Tensor, "L D"]]]]:
    """How many chunks each image's context has, and by that number the contexts of its prompts and of the negative one.

    A prompt and the negative one beside it are of one length; the others do not make them longer, and without guidance
    there is none beside it. Contexts are in the network's precision.
    """
    encoder, negative, dtype = model.text_encoder, settings.negative_prompt, next(model.network.parameters()).dtype
    count = {prompt: encoder.chunks(prompt, settings.prompt_syntax) for prompt in {*prompts, negative}}
    beside = [negative] if settings.guides else []
    chunks = [max(count[p] for p in (prompt, *beside)) for prompt in prompts]
    contexts = {}
    with model.at_work(encoder):
        for number in dict.fromkeys(chunks):
            different = list(dict.fromkeys([*(p for p, n in zip(prompts, chunks) if n == number), *beside]))
            embedded = encoder.encode(different, settings.prompt_syntax).to(dtype)
            contexts[number] = dict(zip(different, embedded.to(model.device)))
    return chunks, contexts


def _blocks(chunks: Sequence[int], batch_size: int) -> Iterator[slice]:
    """The images in order, in blocks of at most batch_size whose contexts have as many chunks."""
    start = 0
    for _, run in groupby(chunks):
        end = start + len(list(run))
        yield from (slice(i, min(i + batch_size, end)) for i in range(start, end, batch_size))
        start = end


def _started(
    model: DiffusionModel,
    start_image: StartImage | None,
    guided: GuidedDenoiser,
    generators: Sequence[torch.Generator],
    times: Float[Tensor, " n"],
    start_noise: str,
) -> tuple[GuidedDenoiser | MaskedDenoiser, Float[Tensor, "B C H W"]]:
    """The denoiser that knows what a mask keeps, and xt at the first time."""
    sigma = model.schedule.alpha_sigma(times[0])[1] if start_noise == "sigma" else 1.0
    if start_image is None:
        return guided, sigma * initial_noise(model.latent_shape, generators).to(model.device)
    with model.at_work(model.autoencoder):  # what the encoder draws comes before the noise, as in diffusers
        pairs = zip(start_image.images.to(model.device), generators)
        x0 = torch.cat([model.autoencoder.encode(image[None], generator) for image, generator in pairs]).float()
    eps = initial_noise(model.latent_shape, generators).to(model.device)
    if (mask := start_image.latent_mask(model.latent_shape)) is not None:
        guided = MaskedDenoiser(guided, x0, mask.to(model.device))
    xt = noised(x0, eps, model.schedule, times)
    if mask is not None and start_image.strength == 1:  # anew, without what the first time still shows of the picture
        xt = torch.where(guided.mask > 0.5, sigma * eps, xt)
    return guided, xt
