"""The `training:` and `optimizer:` sections of a config; the fields are the keys, and here alone are their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how much at a time, and with what.

    num_training_steps: optimizer steps.
    batch_size: images per optimizer step, over all accumulation parts and processes.
    gradient_accumulation_steps: parts a batch is cut into; must divide batch_size.
    caption_dropout: share of captions replaced by the empty prompt, for guidance ([CFG] algorithm 1).
    ema_decay: largest decay of the weights' moving average; 0 turns it off.
    save_and_sample_every_n: steps between checkpoints with a sample grid; the last step always has one.
    mixed_precision: "no", or autocast to "fp16" / "bf16"; weights stay float32.
    gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    compile: torch.compile the network.
    seed: of weights, data order, noise and captions.
    """

    num_training_steps: int = 10_000
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    save_and_sample_every_n: int = 1000
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        for name in ("num_training_steps", "batch_size", "gradient_accumulation_steps", "save_and_sample_every_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"training.gradient_accumulation_steps={self.gradient_accumulation_steps} "
                f"must divide training.batch_size={self.batch_size}"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"training.caption_dropout={self.caption_dropout} must be in [0, 1]")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW ([AdamW]) and its learning rate.

    learning_rate: the peak.
    betas, weight_decay: of AdamW.
    warmup_steps: linear from 0 to the peak.
    schedule: after the warm-up, "cosine" down to final_factor times the peak at the last step, or "constant".
    final_factor: see schedule.
    max_grad_norm: gradients are scaled down to this norm.
    lora_plus_ratio: learning rate of every lora_B over that of the rest ([LoRA+] section 4); None is 1.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_factor: float = 0.02
    max_grad_norm: float = 1.0
    lora_plus_ratio: float | None = None

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        if self.lora_plus_ratio is not None and self.lora_plus_ratio <= 0:
            raise ValueError(f"optimizer.lora_plus_ratio={self.lora_plus_ratio} must be above 0")
