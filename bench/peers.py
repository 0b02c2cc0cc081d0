"""The two sides of a benchmark: our UNet and diffusers' UNet2DConditionModel of the same architecture and weights.

Also diffusers' own way to train (a plain loop as its tutorial has it) and to sample (its schedulers with batched
guidance as its pipelines do it).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from xdiffusion.autoencoders.identity import IdentityAutoencoder
from xdiffusion.checkpoints.diffusers import unet_from_diffusers
from xdiffusion.data.digits import load_digits
from xdiffusion.data.image_set import ImageSet, Split, to_uint8, to_unit_range
from xdiffusion.diffusion.schedules import BetaSchedule
from xdiffusion.model import DiffusionModel
from xdiffusion.networks.unet import UNet
from xdiffusion.text_encoders.clip import CLIPTextEncoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if missing := [name for name in ("diffusers", "peft") if find_spec(name) is None]:  # now, not after half an hour
    sys.exit(f"error: {' and '.join(missing)} not installed here: pip install -e '.[bench]'")

CONTEXT_DIM = 64
CONTEXT_LENGTH = 12
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Size:
    """An architecture that both libraries can express, and the batch it is trained with.

    `patch_size` is folded into the channels of the data beforehand, since diffusers' UNet has no such argument.
    """

    image_size: int
    patch_size: int
    channels: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    head_dim: int
    norm_groups: int
    batch_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the UNet sees."""
        side = self.image_size // self.patch_size
        return self.patch_size**2, side, side


SIZES = {
    "digits": Size(24, 3, (64, 64), (1, 1), 32, 8, 32),
    "mnist": Size(32, 1, (64, 128, 128), (0, 1, 1), 32, 32, 16),
    "tiny": Size(8, 1, (16, 16), (1, 1), 8, 8, 2),
}


def peer_unet(size: Size, seed: int = 0, context_dim: int = CONTEXT_DIM) -> nn.Module:
    """diffusers' UNet of this size; its attention_head_dim is the number of heads."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=size.shape[-1],
        in_channels=size.shape[0],
        out_channels=size.shape[0],
        block_out_channels=size.channels,
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in size.transformer_depth],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(size.transformer_depth)],
        cross_attention_dim=context_dim,
        attention_head_dim=[width // size.head_dim for width in size.channels],
        use_linear_projection=True,
        norm_num_groups=size.norm_groups,
        resnet_time_scale_shift="scale_shift",
    )


def peer_unet_like(network: DictConfig, image_size: int, context_dim: int, parameters: int, seed: int) -> nn.Module:
    """diffusers' UNet with the levels of a config's `model.network:`, of about so many parameters.

    Its widths are ours by a common factor of 64ths, the one that brings its parameters closest; half as many norm groups
    make the choice fine enough.
    """
    groups = network.norm_groups // 2

    def build(share: int) -> nn.Module:
        channels = tuple(width * share // 64 for width in network.channels)
        head_dim = network.head_dim * share // 64  # as many heads as ours
        depth = tuple(network.transformer_depth)
        return peer_unet(Size(image_size, network.patch_size, channels, depth, head_dim, groups, 1), seed, context_dim)

    def distance(share: int) -> float:
        with torch.device("meta"):
            return abs(count(build(share)) - parameters)

    parts = (*(width / groups for width in network.channels), network.head_dim)  # these must stay whole
    fitting = (share for share in range(32, 97) if all((part * share / 64).is_integer() for part in parts))
    return build(min(fitting, key=distance))


def our_model(size: Size, peer: nn.Module) -> DiffusionModel:
    """Our model with the peer's UNet weights, DDPM's linear betas, eps prediction and a random frozen text encoder."""
    torch.manual_seed(0)
    network = UNet(
        in_channels=size.shape[0],
        context_dim=CONTEXT_DIM,
        channels=size.channels,
        num_res_blocks=1,
        transformer_depth=size.transformer_depth,
        head_dim=size.head_dim,
        norm_groups=size.norm_groups,
    )
    network.load_state_dict(unet_from_diffusers(peer.state_dict()))
    text_encoder = CLIPTextEncoder(width=CONTEXT_DIM, context_length=CONTEXT_LENGTH)
    model = DiffusionModel(network, text_encoder, IdentityAutoencoder(size.shape[0]), BetaSchedule(), "eps", size.shape)
    return model.requires_grad_(False)


def check_same_size(ours: nn.Module, theirs: nn.Module) -> dict[str, int]:
    """Both parameter counts.

    Raises:
        AssertionError: if they differ by more than one percent.
    """
    counts = {f"parameters_{side}": count(model) for side, model in (("ours", ours), ("theirs", theirs))}
    smaller, larger = sorted(counts.values())
    assert larger <= 1.01 * smaller, f"not the same size: {counts}"
    return counts


def count(model: nn.Module, trainable: bool = False) -> int:
    """Parameters of a model, or the trainable ones alone."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


@torch.no_grad()
def largest_difference(ours: nn.Module, theirs: nn.Module, size: Size, device: torch.device) -> float:
    """max |ours - theirs| of one forward pass over max |theirs|: that both compute the same."""
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(2, *size.shape, generator=generator).to(device)
    time = torch.tensor([3.0, 700.0], device=device)
    context = torch.randn(2, CONTEXT_LENGTH, CONTEXT_DIM, generator=generator).to(device)
    expected = as_function(theirs)(xt, time, context)
    return float((ours(xt, time, context) - expected).abs().max() / expected.abs().max())


def as_function(unet: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """diffusers' UNet as (xt, time, context) -> prediction."""
    return lambda xt, time, context: unet(xt, time, encoder_hidden_states=context, return_dict=False)[0]


class PeerNetwork(nn.Module):
    """diffusers' UNet on folded patches as the network of a DiffusionModel: one code samples and scores both sides."""

    def __init__(self, unet: nn.Module, patch_size: int):
        super().__init__()
        self.unet = unet
        self.patch_size = patch_size

    def forward(self, xt: Tensor, time: Tensor, context: Tensor) -> Tensor:
        folded = F.pixel_unshuffle(xt, self.patch_size)
        return F.pixel_shuffle(as_function(self.unet)(folded, time, context), self.patch_size)


def peer_model(unet: nn.Module, patch_size: int, text_encoder: nn.Module, image_shape: tuple[int, int, int]) -> DiffusionModel:
    """diffusers' UNet with the schedule of its DDPMScheduler, in evaluation mode."""
    parts = PeerNetwork(unet, patch_size), text_encoder, IdentityAutoencoder(image_shape[0]), BetaSchedule(), "eps"
    return DiffusionModel(*parts, image_shape).eval().requires_grad_(False)


@contextmanager
def peft_disabled(model: DiffusionModel) -> Iterator[None]:
    """Within this block the LoRA of peft in a `peer_model` is off."""
    model.network.unet.disable_adapters()
    try:
        yield
    finally:
        model.network.unet.enable_adapters()


def folded_digits(size: Size) -> ImageSet:
    """The embedded digits at this size, with patches folded into channels."""
    digits = load_digits(size.image_size)

    def fold(split: Split) -> Split:
        return replace(split, images=F.pixel_unshuffle(split.images, size.patch_size))

    return replace(digits, train=fold(digits.train), test=fold(digits.test))


class PeerTraining:
    """The training loop of diffusers' tutorial: DDPM noise, eps loss, gradient clipping, AdamW at its defaults.

    Args:
        unet: its weights that require gradients are trained.
        warmup_steps: of the learning rate.
        learning_rate: the tutorial's, unless said otherwise.
        average: keep diffusers' moving average of the weights, as its training scripts do with --use_ema.
    """

    def __init__(self, unet: nn.Module, warmup_steps: int = 500, learning_rate: float = 1e-4, *, average: bool = False):
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_constant_schedule_with_warmup
        from diffusers.training_utils import EMAModel

        self.unet = unet.train()
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.trainable = [p for p in unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=learning_rate)
        self.warmup = get_constant_schedule_with_warmup(self.optimizer, warmup_steps)
        self.ema = EMAModel(self.trainable) if average else None

    def step(self, x0: Tensor, context: Tensor) -> float:
        """One optimizer step; returns its loss."""
        noise = torch.randn_like(x0)
        timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        noisy = self.scheduler.add_noise(x0, noise, timesteps)
        noise_pred = self.unet(noisy, timesteps, encoder_hidden_states=context, return_dict=False)[0]
        loss = F.mse_loss(noise_pred, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.warmup.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.trainable)
        return loss.item()


def add_peft_lora(unet: nn.Module, rank: int, layers: Sequence[str] = ATTENTION, larger: Sequence[str] = ()) -> nn.Module:
    """Freeze diffusers' UNet and give layers a LoRA by peft with its LoRA training script's settings.

    Args:
        rank: of the layers, and their alpha.
        layers: by their names or the ends of them; the script's are the attention projections.
        larger: those whose rank and alpha are one more.
    """
    from peft import LoraConfig

    unet.requires_grad_(False)
    pattern = dict.fromkeys(larger, rank + 1)
    patterns = {"rank_pattern": pattern, "alpha_pattern": pattern, "target_modules": list(layers)}
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", **patterns))
    return unet


def ranks_for(unet: nn.Module, layers: Sequence[str], parameters: int) -> tuple[int, list[str]]:
    """The rank of a LoRA on these layers, and those of one rank more, for as many parameters or just fewer."""
    weights = {name: unet.get_submodule(name).weight for name in layers}
    cost = {name: len(weight) + weight[0].numel() for name, weight in weights.items()}
    rank, larger = max(1, parameters // sum(cost.values())), []
    left = parameters - rank * sum(cost.values())
    for name in layers:
        if cost[name] <= left:
            larger.append(name)
            left -= cost[name]
    return rank, larger


@torch.no_grad()
def peer_sample(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    scheduler,
    noise: Tensor,
    context: Tensor,
    null_context: Tensor,
    *,
    steps: int,
    cfg_scale: float,
) -> Tensor:
    """A diffusers pipeline's denoising loop: both halves of the guidance in one batch, then the scheduler's step."""
    scheduler.set_timesteps(steps, device=noise.device)
    both = torch.cat([null_context.expand_as(context), context])
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        uncond, cond = network(model_input, t, both).chunk(2)
        latents = scheduler.step(uncond + cfg_scale * (cond - uncond), t, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def prompt_accuracy(judge: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images, as a saved picture would hold them, in which the judge sees the prompted class."""
    seen = to_unit_range(to_uint8(images))
    return round(float((judge(seen).argmax(1) == labels).float().mean()), 4)
