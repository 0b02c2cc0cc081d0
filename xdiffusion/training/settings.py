"""The sections of a config that a run of training reads; the fields are the keys, and here alone are their defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf

from xdiffusion.places import CACHE_FOLDER


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how much at a time, and with what.

    num_training_steps: optimizer steps.
    batch_size: images per optimizer step, over all accumulation parts and processes.
    gradient_accumulation_steps: parts a batch is cut into; must divide batch_size.
    caption_dropout: share of captions replaced by the empty prompt, for guidance ([CFG] algorithm 1).
    ema_decay: largest decay of the weights' moving average; 0 turns it off.
    save_and_sample_every_n: steps between checkpoints with a sample grid; the last step always has one.
    sample_prompts: what a sample grid draws, each twice, read as those of sample.py; null: captions. The weights do not
        depend on it.
    mixed_precision: "no", or autocast to "fp16" / "bf16"; what is trained stays float32.
    half_frozen_weights: of a run that trains adapters or words alone: hold the network and the text encoder, which are
        frozen, in mixed_precision's dtype too, in half the memory. No effect with "no".
    gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    shard_weights: of several processes, each holds a share of the network's weights, gradients, moments and average
        (FSDP), not the whole; for runs that train all of the network. No effect on one process.
    compile: torch.compile the network.
    seed: of weights, data order, noise and captions.
    stop_above: stop where a loss is more than this many times the median of the last 100, from the 21st step on; null lets it.
    rollbacks: how often a run that diverges returns to its last good checkpoint and goes on with other noise; where it
        diverges again before it has a newer one, to the one before.
    """

    num_training_steps: int = 10_000
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    save_and_sample_every_n: int = 1000
    sample_prompts: Sequence[str] | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    half_frozen_weights: bool = False
    gradient_checkpointing: bool = False
    shard_weights: bool = False
    compile: bool = False
    seed: int = 0
    stop_above: float | None = 1000.0
    rollbacks: int = 0

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        counts = ("num_training_steps", "batch_size", "gradient_accumulation_steps", "save_and_sample_every_n")
        check_ranges("training", self, counts, at_least=1)
        check_ranges("training", self, ("caption_dropout",), at_least=0, at_most=1)
        check_ranges("training", self, ("ema_decay",), at_least=0, below=1)
        check_ranges("training", self, ("stop_above",), above=1)
        check_ranges("training", self, ("rollbacks",), at_least=0)
        check_ranges("training", self, ("seed",), at_least=-(2**63), below=2**63)  # of a generator
        if not all(prompt.strip() for prompt in self.sample_prompts or ()):
            raise ValueError(
                f"training.sample_prompts={list(self.sample_prompts)!r:.200} must be texts that are not empty, or null: "
                "captions are drawn"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"training.gradient_accumulation_steps={self.gradient_accumulation_steps} "
                f"must divide training.batch_size={self.batch_size}"
            )

    def is_due(self, step: int) -> bool:
        """Whether a step ends with a checkpoint and a picture."""
        return step % self.save_and_sample_every_n == 0 or step == self.num_training_steps


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW ([AdamW]) and its learning rate.

    kind: "adamw", or "adamw8bit", whose moments take a quarter of the memory ([Adam8bit]; GPU, pip install bitsandbytes).
    learning_rate: the peak.
    betas, weight_decay: of AdamW.
    warmup_steps: linear from 0 to the peak; a run of no more steps never comes down from there.
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
        check_ranges("optimizer", self, ("learning_rate", "max_grad_norm", "lora_plus_ratio"), above=0)
        check_ranges("optimizer", self, ("weight_decay", "warmup_steps", "final_factor"), at_least=0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)} must be two numbers in [0, 1)")


@dataclass(frozen=True)
class CheckpointSettings:
    """Which checkpoints of a run stay, and how exact a LoRA's file is.

    keep_last, keep_every: once more than keep_last checkpoints stand there, older ones are deleted, but for those of steps
        that keep_every divides; while the run goes on there is one more, as the next steps tell whether the newest is good.
        null keeps all.
    lora_dtype: of the factors in a LoRA's file, where it can hold them. They are trained in float32, and a run that is resumed
        goes on from that.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    lora_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        check_ranges("checkpoints", self, ("keep_last", "keep_every"), at_least=1)
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError(f"checkpoints.keep_every={self.keep_every} needs checkpoints.keep_last: without it all are kept")


@dataclass(frozen=True)
class CacheSettings:
    """What is computed once, before the first step, and kept on disk.

    latents, text_embeddings: what of; the autoencoder, or the text encoder, is off the GPU but for the sample grids then.
    folder: of all runs; entries are by content, so that none can be of an older picture or model.
    """

    latents: bool = False
    text_embeddings: bool = False
    folder: str = CACHE_FOLDER

    def check(self) -> None:
        """There is no value that no run can have."""


@dataclass(frozen=True)
class PriorSettings:
    """The `prior:` section of a config.

    data_dir: folder of the class images; those that are missing are drawn by the base model.
    prompt: of the class, such as "a photo of a dog" where the subject is "a photo of sks dog".
    num_images: how many there should be.
    weight: of a class image in the loss, where one of the subject has 1.
    """

    data_dir: str
    prompt: str
    num_images: int = 200
    weight: float = 1.0

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        check_ranges("prior", self, ("num_images",), at_least=1)
        check_ranges("prior", self, ("weight",), above=0)


@dataclass(frozen=True)
class TextualInversionSettings:
    """The `textual_inversion:` section of a config.

    token: the new word, such as "<cat>", which the captions must name.
    initialiser: a word or words near it in meaning, from which it starts.
    vectors: how many embeddings it has; the initialiser's tokens in turn.
    learning_rate: of the embeddings; null is optimizer.learning_rate.
    """

    token: str
    initialiser: str
    vectors: int = 1
    learning_rate: float | None = None

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        check_ranges("textual_inversion", self, ("learning_rate",), above=0)


SECTIONS = {
    "training": TrainingSettings,
    "optimizer": OptimizerSettings,
    "checkpoints": CheckpointSettings,
    "cache": CacheSettings,
}
OPTIONAL_SECTIONS = {"prior": PriorSettings, "textual_inversion": TextualInversionSettings}


def settings_of(config: DictConfig, section: str) -> Any:
    """One of these sections of a resolved config, as the class of its name.

    Raises:
        ValueError: for values that no run can have.
    """
    settings = (SECTIONS | OPTIONAL_SECTIONS)[section](**OmegaConf.to_container(config[section]))
    settings.check()
    return settings


def check_settings(config: DictConfig) -> None:
    """Raise ValueError for values of these sections that no run can have, before anything is loaded or made."""
    for section in (*SECTIONS, *(name for name in OPTIONAL_SECTIONS if name in config)):
        settings_of(config, section)
    rate = OmegaConf.select(config, "text_encoder_lora.learning_rate")
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"text_encoder_lora.learning_rate={rate} must be above 0 and finite, or null: optimizer.learning_rate")
    check_library(config.optimizer.kind)


def check_library(optimizer: str) -> None:
    """Raise ValueError where the library of an `optimizer.kind` is missing."""
    if optimizer == "adamw8bit":
        try:
            import bitsandbytes.optim  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "optimizer.kind='adamw8bit' needs the library bitsandbytes: pip install bitsandbytes, or take kind: adamw"
            ) from error


def check_ranges(
    section: str,
    settings: Any,
    keys: Sequence[str],
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise ValueError where one of these numbers is not in the range, or is NaN; None is in every one."""
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not (at_least <= value <= at_most and above < value < below):
            bounds = {"at least": at_least, "at most": at_most, "above": above, "below": below}
            allowed = " and ".join(f"{name} {bound}" for name, bound in bounds.items() if math.isfinite(bound))
            allowed = f"finite, {allowed}" if math.isinf(value) else allowed
            or_null = ", or null" if type(None) in get_args(get_type_hints(type(settings))[key]) else ""
            raise ValueError(f"{section}.{key}={value} must be {allowed}{or_null}")
