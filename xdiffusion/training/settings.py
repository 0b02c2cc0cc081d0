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
    mixed_precision: "no", or autocast to "fp16" / "bf16"; what is trained stays float32.
    half_frozen_weights: of a run that trains adapters or words alone: hold the network and the text encoder, which are
        frozen, in mixed_precision's dtype too, in half the memory. No effect with "no".
    gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    shard_weights: of several processes, each holds a share of the network's weights, gradients, moments and average
        (FSDP), not the whole; for runs that train all of the network. No effect on one process.
    compile: torch.compile the network.
    seed: of weights, data order, noise and captions.
    keep_last, keep_every: once more than keep_last checkpoints stand there, older ones are deleted, but for those of steps
        that keep_every divides. null keeps all.
    stop_above: stop where a loss is more than this many times the median of the last 100; null lets it.
    rollbacks: how often a run that diverges returns to its last good checkpoint and goes on with other noise.
    cache_latents, cache_text_embeddings: compute them once, keep them in cache_folder, and hold the autoencoder, or the
        text encoder, off the GPU but for the sample grids.
    cache_folder: of all runs; entries are by content, so that none can be of an older picture or model.
    """

    num_training_steps: int = 10_000
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    save_and_sample_every_n: int = 1000
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    half_frozen_weights: bool = False
    gradient_checkpointing: bool = False
    shard_weights: bool = False
    compile: bool = False
    seed: int = 0
    keep_last: int | None = None
    keep_every: int | None = None
    stop_above: float | None = None
    rollbacks: int = 0
    cache_latents: bool = False
    cache_text_embeddings: bool = False
    cache_folder: str = "output/cache"

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        for name in ("num_training_steps", "batch_size", "gradient_accumulation_steps", "save_and_sample_every_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 1")
        for name in ("keep_last", "keep_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 1, or null")
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError(f"training.keep_every={self.keep_every} needs training.keep_last: without it all are kept")
        if self.stop_above is not None and self.stop_above <= 1:
            raise ValueError(f"training.stop_above={self.stop_above} must be above 1, or null")
        if self.rollbacks < 0:
            raise ValueError(f"training.rollbacks={self.rollbacks} must be at least 0")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"training.gradient_accumulation_steps={self.gradient_accumulation_steps} "
                f"must divide training.batch_size={self.batch_size}"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"training.caption_dropout={self.caption_dropout} must be in [0, 1]")

    def is_due(self, step: int) -> bool:
        """Whether a step ends with a checkpoint and a picture."""
        return step % self.save_and_sample_every_n == 0 or step == self.num_training_steps


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW ([AdamW]) and its learning rate.

    kind: "adamw", or "adamw8bit", whose moments take a quarter of the memory ([Adam8bit]; GPU, pip install bitsandbytes).
    learning_rate: the peak.
    betas, weight_decay: of AdamW.
    warmup_steps: linear from 0 to the peak.
    schedule: after the warm-up, "cosine" down to final_factor times the peak at the last step, or "constant".
    final_factor: see schedule.
    max_grad_norm: gradients are scaled down to this norm.
    lora_plus_ratio: learning rate of every lora_B over that of the rest ([LoRA+] section 4); None is 1.
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
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
