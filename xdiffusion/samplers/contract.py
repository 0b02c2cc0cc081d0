"""What a sampler asks for and offers: the denoiser it calls, the noise it draws, the callback it makes.

A sampler is one plain function `sample_*(denoiser, x_T, times, *, ..., generator, on_step) -> x0`. It knows of a model only the
denoiser contract below, so any estimate of x0 can be sampled: a UNet, a latent UNet, or a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.diffusion.schedules import Schedule

OnStep = Callable[[int, Tensor, Tensor], None]
Generators = torch.Generator | Sequence[torch.Generator]


@runtime_checkable
class BoundDenoiser(Protocol):
    """`(xt, t) -> x0` with everything else (prompts, guidance) bound; t is a 0-dim tensor in (0, 1]."""

    schedule: Schedule

    def __call__(self, xt: Float[Tensor, "B C H W"], t: Float[Tensor, ""]) -> Float[Tensor, "B C H W"]: ...


def fresh_noise(xt: Float[Tensor, "B C H W"], generator: Generators | None) -> Float[Tensor, "B C H W"]:
    """Standard normal noise like xt: from one generator, or sample i from generator i.

    Raises:
        ValueError: if there is no generator, because a sample that cannot be repeated is a bug.
    """
    if generator is None:
        raise ValueError("this sampler draws noise at each step: pass generator=torch.Generator().manual_seed(...)")
    if isinstance(generator, torch.Generator):
        return torch.randn(xt.shape, generator=generator, device=generator.device, dtype=xt.dtype).to(xt.device)
    noise = [torch.randn(xt.shape[1:], generator=g, device=g.device, dtype=xt.dtype) for g in generator]
    return torch.stack(noise).to(xt.device)
