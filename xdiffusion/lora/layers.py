"""Layers that hold a frozen weight and any number of named low-rank adapters ([LoRA] section 4.1).

    W' = W + sum_i scale_i * (lora_alpha_i / rank_i) * B_i A_i

A LoRA layer is its base class plus adapters: `LoRALinear` is an `nn.Linear`, so the names of the base weights do not
change when a model is wrapped. B starts at zero, so a fresh adapter changes no bit of the output. `scale` is the strength
at run time, 1 as trained. A convolution's A is a convolution of the same kernel to `rank` channels, its B a 1x1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xdiffusion.lora.functional import lora_linear, merged_weight, plain_lora_linear

DEFAULT_ADAPTER = "default"


class LoRAError(ValueError):
    """A LoRA that cannot be made, applied, saved or loaded: which one, and why."""


@dataclass
class AdapterSettings:
    """rank and lora_alpha fix the trained scaling; dropout acts in training; scale and enabled are set at run time."""

    rank: int
    lora_alpha: float
    dropout: float = 0.0
    scale: float = 1.0
    enabled: bool = True

    @property
    def scaling(self) -> float:
        """lora_alpha / rank."""
        return self.lora_alpha / self.rank

    @property
    def strength(self) -> float:
        """What B A is multiplied by now: scale * lora_alpha / rank, 0 while disabled."""
        return self.scale * self.scaling if self.enabled else 0.0


class LoRALayer(nn.Module):
    """The adapters of one layer, mixed into the layer's own class.

    lora_A[name]: (rank, in, *kernel) and lora_B[name]: (out, rank, *ones), both float32.
    """

    weight: Tensor
    bias: Tensor | None

    def _init_adapters(self) -> None:
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.adapters: dict[str, AdapterSettings] = {}

    @classmethod
    def wrap(cls, layer: nn.Module) -> LoRALayer:
        """A LoRA layer without adapters that holds the very parameters, hooks and settings of `layer`."""
        wrapped = cls.__new__(cls)
        wrapped.__dict__ = layer.__dict__.copy()
        wrapped._parameters = layer._parameters.copy()
        wrapped._modules = layer._modules.copy()
        wrapped._init_adapters()
        return wrapped

    def add_adapter(self, name: str, rank: int, alpha: float, dropout: float = 0.0) -> None:
        """Add an adapter: A drawn as nn.Linear draws its weights, B zero.

        Raises:
            LoRAError: for a rank outside 1..the weight's larger side, a dropout outside [0, 1), or a name that is taken.
        """
        out_size, in_size = self.weight.flatten(1).shape
        if not 1 <= rank <= max(out_size, in_size):
            raise LoRAError(
                f"LoRA rank={rank} must be in 1..{max(out_size, in_size)} for a weight {tuple(self.weight.shape)}"
            )
        if not 0 <= dropout < 1:
            raise LoRAError(f"LoRA dropout={dropout} must be in [0, 1)")
        if name in self.adapters:
            raise LoRAError(f"this layer has an adapter named {name!r} already")
        device, kernel = self.weight.device, self.weight.shape[2:]
        lora_A = torch.empty(rank, *self.weight.shape[1:], device=device)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(lora_A)
        self.lora_B[name] = nn.Parameter(torch.zeros(out_size, rank, *[1] * len(kernel), device=device))
        self.adapters[name] = AdapterSettings(rank, alpha, dropout)

    def delta(self, name: str) -> Tensor:
        """(lora_alpha / rank) B A of one adapter, in W's shape and float32."""
        product = self.lora_B[name].float().flatten(1) @ self.lora_A[name].float().flatten(1)
        return (self.adapters[name].scaling * product).view(self.weight.shape)

    def active(self) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, scaling) whose product is the sum of the enabled adapters' updates, or None if none is enabled."""
        names = [name for name, settings in self.adapters.items() if settings.enabled]
        if not names:
            return None
        if len(names) == 1:
            return self.lora_A[names[0]], self.lora_B[names[0]], self.adapters[names[0]].strength
        lora_A = torch.cat([self.lora_A[n] for n in names])
        lora_B = torch.cat([self.lora_B[n] * self.adapters[n].strength for n in names], dim=1)
        return lora_A, lora_B, 1.0

    def effective_weight(self) -> Tensor:
        """W' with every enabled adapter in it, in W's dtype."""
        factors = self.active()
        return self.weight if factors is None else merged_weight(self.weight, *factors)

    def dropout_now(self) -> float:
        """The dropout of the low-rank branch in this mode."""
        return max((s.dropout for s in self.adapters.values() if s.enabled), default=0.0) if self.training else 0.0


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with LoRA, new or (by `wrap`) around an existing one.

    Args:
        in_features, out_features, bias: of the base layer.
        rank: of the first adapter, named "default".
        alpha: lora_alpha; the update is multiplied by alpha / rank.
        dropout: on the input of the low-rank branch, while training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 4,
        alpha: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__(in_features, out_features, bias)
        self._init_adapters()
        self.add_adapter(DEFAULT_ADAPTER, rank, alpha, dropout)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        factors = self.active()
        if factors is None:
            return F.linear(x, self.weight, self.bias)
        dropout = self.dropout_now()
        if dropout:
            return plain_lora_linear(x, F.dropout(x, dropout), self.weight, self.bias, *factors)
        return lora_linear(x, self.weight, self.bias, *factors)


class _LoRAConv(LoRALayer):
    """W' once per call, except where dropout needs the branch apart; grouped convolutions are merged always."""

    def forward(self, x: Tensor) -> Tensor:
        factors = self.active()
        if factors is None:
            return self._conv_forward(x, self.weight, self.bias)
        if torch.is_grad_enabled() and self.groups == 1:
            lora_A, lora_B, scaling = factors
            dropout = self.dropout_now()
            branch_x = F.dropout(x, dropout) if dropout else x
            up = F.conv2d if self.weight.dim() == 4 else F.conv1d
            branch = up(self._conv_forward(branch_x, lora_A.to(x.dtype), None), lora_B.to(x.dtype))
            return self._conv_forward(x, self.weight, self.bias) + scaling * branch
        return self._conv_forward(x, merged_weight(self.weight, *factors), self.bias)


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    """A 2-D convolution with LoRA, made by `wrap`."""


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    """A 1-D convolution with LoRA, made by `wrap`."""
