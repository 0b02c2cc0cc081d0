"""The training loop: one for base models and for LoRA, which differ only in which weights are trainable.

A step: pick the batch, embed its captions, differentiate the objective, clip, AdamW, moving average. Every draw is a
function of the seed and the step (see `randomness`), so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import DictConfig, OmegaConf
from torch import nn

from xdiffusion.data.image_set import ImageSet
from xdiffusion.diffusion.objective import loss
from xdiffusion.model import DiffusionModel
from xdiffusion.text_encoders.prompt_cache import PromptCache
from xdiffusion.training.ema import EMA
from xdiffusion.training.randomness import DataOrder, generator_at
from xdiffusion.training.settings import OptimizerSettings, TrainingSettings


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is not finite."""


@dataclass(frozen=True)
class StepMetrics:
    """What a step reports; grad_norm is before clipping."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    images_per_second: float


class Trainer:
    """The state of a run and its step.

    Args:
        model: its weights that require gradients are trained, all others are left alone.
        data: the images and captions.
        config: resolved; the sections `training`, `optimizer` and `diffusion` are read.
        force_cpu: do not use an accelerator that is there.

    Raises:
        ValueError: for settings that cannot work together or on this device.
    """

    def __init__(self, model: DiffusionModel, data: ImageSet, config: DictConfig, *, force_cpu: bool = False):
        self.settings = TrainingSettings(**OmegaConf.to_container(config.training))
        self.optimizer_settings = OptimizerSettings(**OmegaConf.to_container(config.optimizer))
        self.objective = {k: config.diffusion[k] for k in ("prediction", "min_snr_gamma")}
        self.settings.check()
        self.optimizer_settings.check()
        AcceleratorState._reset_state()  # else a second run in this process must have the first one's precision
        self.accelerator = Accelerator(mixed_precision=self.settings.mixed_precision, cpu=force_cpu)
        self.model = model.to(self.accelerator.device).train()
        self.data = data
        self.order = DataOrder(len(data.train), self.settings.batch_size, self.settings.seed)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trains_text = any(p.requires_grad for p in model.text_encoder.parameters())
        self.embed = model.text_encoder.encode if trains_text else PromptCache(model.text_encoder)
        self.ema = EMA(list(self.trainable.values()), self.settings.ema_decay)
        model.network.gradient_checkpointing = self.settings.gradient_checkpointing
        network = torch.compile(model.network) if self.settings.compile else model.network
        groups = by_relative_rate(self.trainable, config)
        self.relative_rates = list(groups)
        optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in groups.values()],
            lr=self.optimizer_settings.learning_rate,
            betas=self.optimizer_settings.betas,
            weight_decay=self.optimizer_settings.weight_decay,
            fused=True,
        )
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)

    def step(self, step: int) -> StepMetrics:
        """Take optimizer step number `step` (the first is 1).

        Raises:
            TrainingDiverged: before any weight is changed by a loss or gradient that is not finite.
        """
        started = time.perf_counter()
        learning_rate = learning_rate_at(step, self.settings.num_training_steps, self.optimizer_settings)
        for group, relative_rate in zip(self.optimizer.param_groups, self.relative_rates):
            group["lr"] = relative_rate * learning_rate
        # LoRA's dropout draws from the global generator, which must not depend on the steps before either
        torch.manual_seed(generator_at(self.settings.seed, "dropout", step).initial_seed())
        parts = self.settings.gradient_accumulation_steps
        total = sum(self._backward_part(step, part, parts) for part in range(parts))
        grad_norm = self.accelerator.clip_grad_norm_(self.trainable.values(), self.optimizer_settings.max_grad_norm)
        self._check_finite(step, float(total), float(grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)
        seconds = time.perf_counter() - started
        return StepMetrics(step, float(total), float(grad_norm), learning_rate, self.settings.batch_size / seconds)

    def _backward_part(self, step: int, part: int, parts: int) -> torch.Tensor:
        """Add one accumulation part's gradient; returns its share of the batch's mean loss."""
        device = self.accelerator.device
        rows = slice(*(k * self.settings.batch_size // parts for k in (part, part + 1)))
        draws = torch.rand(2, self.settings.batch_size, generator=generator_at(self.settings.seed, "captions", step))
        wording, dropped = draws[:, rows]
        batch = self.data.batch(self.order.indices(step - 1)[rows], wording)
        captions = ["" if d < self.settings.caption_dropout else c for c, d in zip(batch.captions, dropped.tolist())]
        with torch.no_grad():
            x0 = self.model.autoencoder.encode(batch.images.to(device))
        with self.accelerator.autocast():
            part_loss = loss(
                self.network,
                self.model.schedule,
                x0=x0,
                context=self.embed(captions),
                generator=generator_at(self.settings.seed, "noise", step),
                share=(part, parts),
                **self.objective,
            )
        self.accelerator.backward(part_loss / parts)
        return part_loss.detach() / parts

    def _check_finite(self, step: int, value: float, grad_norm: float) -> None:
        # with fp16 a gradient overflow is the scaler's business: it skips the step and lowers its scale
        scaled = self.accelerator.scaler is not None
        if not math.isfinite(value) or not (scaled or math.isfinite(grad_norm)):
            raise TrainingDiverged(f"loss {value}, gradient norm {grad_norm} at step {step}")


def fit(
    trainer: Trainer,
    *,
    first_step: int,
    on_step: Callable[[StepMetrics], None],
    on_checkpoint: Callable[[int], None],
) -> None:
    """Train from first_step to the last; on_checkpoint runs with the averaged weights in place."""
    settings = trainer.settings
    for step in range(first_step, settings.num_training_steps + 1):
        on_step(trainer.step(step))
        if step % settings.save_and_sample_every_n == 0 or step == settings.num_training_steps:
            trainer.model.eval()
            with trainer.ema.in_place():
                on_checkpoint(step)
            trainer.model.train()


def by_relative_rate(trainable: Mapping[str, nn.Parameter], config: DictConfig) -> dict[float, list[nn.Parameter]]:
    """The parameters by their learning rate over optimizer.learning_rate.

    That is `optimizer.lora_plus_ratio` for a lora_B ([LoRA+] section 4), `text_encoder_lora.learning_rate` over the rate
    of the others for the text encoder, the product of both for a lora_B there, and 1 for all the rest.
    """
    of_b = config.optimizer.lora_plus_ratio or 1.0
    text_rate = OmegaConf.select(config, "text_encoder_lora.learning_rate")
    of_text = 1.0 if text_rate is None else text_rate / config.optimizer.learning_rate
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        relative = (of_text if name.startswith("text_encoder.") else 1.0) * (of_b if ".lora_B." in name else 1.0)
        groups.setdefault(relative, []).append(parameter)
    return groups


def learning_rate_at(step: int, last_step: int, settings: OptimizerSettings) -> float:
    """The learning rate of step 1..last_step: linear warm-up, then cosine or constant."""
    warmed = min(1.0, step / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return settings.learning_rate * warmed
    progress = max(0, step - settings.warmup_steps) / max(1, last_step - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * warmed * (settings.final_factor + (1 - settings.final_factor) * cosine)
