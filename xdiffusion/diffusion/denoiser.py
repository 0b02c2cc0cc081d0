"""The denoiser contract: `(xt, t) -> x0`, all that a sampler knows of a model.

    Denoiser(network, schedule, prediction)(xt, t, context) -> x0
    guided(xt, t) = uncond + cfg_scale * (cond - uncond)                              ([CFG] eq. 6, in x0 space)

Guidance is linear, so applying it to x0 equals applying it to eps or v at the same xt.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.diffusion.objective import Network
from xdiffusion.diffusion.predictions import Prediction, to_x0
from xdiffusion.diffusion.schedules import Schedule


class Denoiser:
    """A network, read as an estimate of the data.

    Args:
        network: `(xt, time, context) -> prediction`.
        schedule: maps t to alpha, sigma and the network's time.
        prediction: what the network outputs, "eps", "v" or "x0".
        whole_steps: round the network's time, for a network that was trained at whole timesteps and a grid that visits
            times in between; the noise level stays the exact one.
    """

    def __init__(self, network: Network, schedule: Schedule, prediction: Prediction, whole_steps: bool = False):
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.whole_steps = whole_steps

    def __call__(
        self, xt: Float[Tensor, "B C H W"], t: Float[Tensor, ""] | Float[Tensor, " B"], context: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B C H W"]:
        """The estimate of x0 at the times t in (0, 1], one or one for each; in float32 whatever the network's dtype."""
        alpha, sigma = (c.view(-1, 1, 1, 1) if c.dim() else c for c in self.schedule.alpha_sigma(t))
        time = self.schedule.network_time(t)
        time = (time.round() if self.whole_steps else time).to(xt.device, torch.float32)
        output = self.network(xt, time.expand(xt.shape[0]), context).float()
        return to_x0(self.prediction, output, xt, alpha, sigma)


class GuidedDenoiser:
    """A denoiser with its prompts bound, guided away from the unconditional estimate; what samplers call.

    Both estimates come from one batched pass, whose context is put together once.

    Args:
        denoiser: the unguided denoiser.
        context: (B, L, D) embeddings of the prompts.
        null_context: (L, D) or (1 or B, L, D) embedding of the empty (or negative) prompt; None where cfg_scale is 1.
        cfg_scale: 1 is the conditional model (one pass), larger follows the prompt more.
        clip_x0: clamp the estimate to [-1, 1], for pixel-space models ([DDPM] reference implementation).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        context: Float[Tensor, "B L D"],
        null_context: Float[Tensor, "*N L D"] | None,
        cfg_scale: float,
        clip_x0: bool = False,
    ):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.cfg_scale = cfg_scale
        self.clip_x0 = clip_x0
        self.guides = cfg_scale != 1
        self.context = torch.cat([null_context.expand_as(context), context]) if self.guides else context

    def __call__(self, xt: Float[Tensor, "B C H W"], t: Float[Tensor, ""] | Float[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        if self.guides:
            both_t = torch.cat([t, t]) if t.dim() else t
            uncond, cond = self.denoiser(torch.cat([xt, xt]), both_t, self.context).chunk(2)
            x0 = uncond + self.cfg_scale * (cond - uncond)
        else:
            x0 = self.denoiser(xt, t, self.context)
        return x0.clamp(-1, 1) if self.clip_x0 else x0
