"""A LoRA as data: factors by module name, whatever file they came from and whatever file they go to.

    delta = scaling * B A,    scaling = lora_alpha / rank ([LoRA] section 4.1), or lora_alpha / sqrt(rank) ([rsLoRA])

Readers of every format return a `LoRAFile`, writers take one. Names are those of the model that the LoRA is for; a file
for Stable Diffusion, in any of the exchange formats, is read into diffusers' names with the component in front:
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`, `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def scaling_of(lora_alpha: float, rank: int, use_rslora: bool) -> float:
    """lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA."""
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)


@dataclass(frozen=True)
class LoRAFactors:
    """The update of one layer.

    lora_A: (rank, in, *kernel). lora_B: (out, rank, *ones). lora_alpha, use_rslora: see `scaling_of`.
    magnitude: (out,) of DoRA, or None.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    use_rslora: bool = False
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        return scaling_of(self.lora_alpha, self.rank, self.use_rslora)

    def is_finite(self) -> bool:
        """Whether all its numbers are."""
        tensors = (self.lora_A, self.lora_B, self.magnitude)
        return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scaling * B A in the shape of the weight, (out, in, *kernel)."""
        product = self.lora_B.to(dtype).flatten(1) @ self.lora_A.to(dtype).flatten(1)
        return (self.scaling * product).view(self.lora_B.shape[0], *self.lora_A.shape[1:])


@dataclass(frozen=True)
class LoRAFile:
    """Everything that a LoRA file says.

    modules: factors by module name.
    format: the name of the format it was read from; "native" for our own.
    tokens: learned tokens (textual inversion) by name, (width,) or (vectors, width).
    metadata: the file's header as it stands.
    repairs: one line for each thing that was wrong with the file and could be mended without a guess; of a merged LoRA, for
        each learned word that had to be renamed.
    base_hash: content hash of the model it was trained on, base_sample: a few values of each weight that it adapts, see
        `lora.base_identity`, config: resolved, step: of training; of native files.
    path: of the file or folder it was read from.
    """

    modules: Mapping[str, LoRAFactors]
    format: str = "native"
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    base_hash: str | None = None
    base_sample: Mapping[str, Sequence[float]] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    step: int = 0
    path: Path | None = None
