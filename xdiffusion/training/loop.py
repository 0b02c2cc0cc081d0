"""The training loop: one for base models and for LoRA, which differ only in which weights are trainable.

A step: pick the batch, embed its captions, differentiate the objective, clip, AdamW, moving average. Every draw is a
function of the seed and the step (see `randomness`), so a resumed run repeats an uninterrupted one. Several processes
take rows of the same global batch and of its draws, and add their gradients up (see `processes`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import DictConfig, OmegaConf
from torch import nn

from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.diffusion.objective import loss
from xdiffusion.lora.formed_weights import layers_to_form
from xdiffusion.model import DiffusionModel
from xdiffusion.training.batches import Data, Part
from xdiffusion.training.clipping import clip_gradients
from xdiffusion.training.divergence import LossWatch, TrainingDiverged
from xdiffusion.training.ema import EMA
from xdiffusion.training.optimizer import build_optimizer
from xdiffusion.training.packed_weights import LARGEST_PACKED, PackedWeights
from xdiffusion.training.processes import (
    check_shares,
    largest,
    noticing_lost_processes,
    only_add_up_last,
    spread,
    summed,
)
from xdiffusion.training.randomness import generator_at
from xdiffusion.training.row_threads import RowThreads, shares_of_a_step
from xdiffusion.training.settings import OptimizerSettings, TrainingSettings
from xdiffusion.training.sharded_weights import check_can_be_sharded, shard
from xdiffusion.training.sources import Sources


@dataclass(frozen=True)
class StepMetrics:
    """What a step reports; grad_norm is before clipping.

    loss_scale: of fp16's gradient scaler after the step, None without one. skipped: whether it skipped the step.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    images_per_second: float
    loss_scale: float | None = None
    skipped: bool = False


class Trainer:
    """The state of a run and its step.

    Args:
        model: its weights that require gradients are trained, all others are left alone.
        data: the images and captions.
        config: resolved; the sections `training`, `optimizer` and `diffusion` are read.
        class_images: of prior preservation, half of every batch; None for none.
        force_cpu: do not use an accelerator that is there.

    Raises:
        ValueError: for settings that cannot work together or on this device.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: Data,
        config: DictConfig,
        *,
        class_images: CaptionedImages | None = None,
        force_cpu: bool = False,
    ):
        self.settings = TrainingSettings(**OmegaConf.to_container(config.training))
        self.optimizer_settings = OptimizerSettings(**OmegaConf.to_container(config.optimizer))
        self.objective = {k: config.diffusion[k] for k in ("prediction", "min_snr_gamma", "offset_noise")}
        self.settings.check()
        self.optimizer_settings.check()
        AcceleratorState._reset_state()  # else a second run in this process must have the first one's precision
        self.accelerator = Accelerator(mixed_precision=self.settings.mixed_precision, cpu=force_cpu)
        check_shares(self.accelerator, self.settings)
        check_can_be_sharded(model, self.settings, self.optimizer_settings)
        self.sharded = self.settings.shard_weights and self.accelerator.num_processes > 1
        self.watch = LossWatch(self.settings.stop_above)
        self.rollbacks = 0  # how often the run went back; each time with other noise
        self.model = model.train()
        self.data = data
        self.sources = Sources(model, data, class_images, config, self.settings, self.accelerator.device)
        self.batches, self.embed = self.sources.batches, self.sources.embed
        model.network.gradient_checkpointing = self.settings.gradient_checkpointing
        self.network = torch.compile(model.network) if self.settings.compile else model.network
        if self.sharded:
            shard(model.network, self.accelerator.device)
        else:
            self.network = spread(self.accelerator, self.network)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.unwrapped = [p for name, p in self.trainable.items() if not name.startswith("network.")]
        groups = by_relative_rate(self.trainable, config)
        self.relative_rates = list(groups)
        # 8-bit AdamW has one scale for some values in a row: they must be of one weight
        self.packed = PackedWeights(groups, 0 if self.optimizer_settings.kind == "adamw8bit" else LARGEST_PACKED)
        self.ema = EMA(self.packed.updated, self.settings.ema_decay)
        self.optimizer = self.accelerator.prepare(build_optimizer(self.packed.groups.values(), self.optimizer_settings))
        shares = shares_of_a_step(model, self.settings, self.accelerator.device, self.accelerator.num_processes)
        self.row_threads = RowThreads(self.trainable.values(), shares, layers_to_form(model)) if shares > 1 else None
        self.embedding_lock = Lock()  # a cache of embeddings grows as it is asked

    def by_name(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of tensors like those that are updated (averages, say) what belongs to each trained weight, in the same memory."""
        parts = dict(zip(map(id, self.packed.parameters), self.packed.parts(tensors)))
        return {name: parts[id(parameter)] for name, parameter in self.trainable.items()}

    def step(self, step: int) -> StepMetrics:
        """Take optimizer step number `step` (the first is 1).

        Raises:
            TrainingDiverged: before any weight is changed by a loss or gradient that is not finite, or by a loss above
                `training.stop_above` times the median of those before.
        """
        with self.row_threads.as_one_of_them() if self.row_threads is not None else nullcontext():
            return self._step(step)

    def _step(self, step: int) -> StepMetrics:
        started = time.perf_counter()
        learning_rate = learning_rate_at(step, self.settings.num_training_steps, self.optimizer_settings)
        for group, relative_rate in zip(self.optimizer.param_groups, self.relative_rates):
            group["lr"] = relative_rate * learning_rate
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        # LoRA's dropout draws from the global generator, which must not depend on the steps before either
        dropout = (
            torch.default_generator if self.accelerator.device.type == "cpu" else torch
        )  # torch seeds every device
        stream = f"dropout {rank}" if rank else "dropout"
        dropout.manual_seed(generator_at(self.settings.seed, stream, step).initial_seed())
        parts, total = self.settings.gradient_accumulation_steps, 0.0
        for part in range(parts):
            with only_add_up_last(self.accelerator, self.network, part == parts - 1, self.sharded):
                total = total + self._backward_part(step, part * processes + rank, parts * processes)
        total = summed(self.accelerator, total, self.unwrapped)
        max_norm = self.optimizer_settings.max_grad_norm
        grad_norm = clip_gradients(self.accelerator, self.trainable.values(), max_norm)
        self._check(step, float(total), float(grad_norm), learning_rate)
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else None
        self.optimizer.step()
        self.packed.zero_grad()
        self.ema.update(step)
        self.watch.losses.append(float(total))
        seconds = time.perf_counter() - started
        new_scale = scaler.get_scale() if scaler is not None else None
        return StepMetrics(
            step,
            float(total),
            float(grad_norm),
            learning_rate,
            self.settings.batch_size / seconds,
            loss_scale=new_scale,
            skipped=scaler is not None and new_scale < scale,  # accelerate does not see it where AdamW is fused
        )

    def _backward_part(self, step: int, part: int, parts: int) -> torch.Tensor:
        """Add one accumulation part's gradient; returns its share of the batch's mean loss."""
        if self.row_threads is not None:
            shares = self.row_threads.shares
            places = [(part * shares + i, parts * shares) for i in range(shares)]
            batches = [self.batches.part(step, *place) for place in places]  # by one thread: it is short and all Python
            return self.row_threads.backward(lambda i: self._part_loss(step, *places[i], batches[i]))
        part_loss = self._part_loss(step, part, parts, self.batches.part(step, part, parts))
        # of sharded gradients torch takes the mean over the processes, not the sum
        self.accelerator.backward(part_loss * self.accelerator.num_processes if self.sharded else part_loss)
        return part_loss.detach()

    def _part_loss(self, step: int, part: int, parts: int, batch: Part) -> torch.Tensor:
        """What one of `parts` equal parts adds to the batch's mean loss."""
        with self.embedding_lock:
            context = self.embed(batch.captions)
        with self.accelerator.autocast():
            part_loss = loss(
                self.network,
                self.model.schedule,
                x0=batch.x0,
                context=context,
                weights=batch.weights,
                generator=generator_at(self.settings.seed, self.noise_stream, step),
                share=(part, parts),
                **self.objective,
            )
        return part_loss / parts

    @property
    def noise_stream(self) -> str:
        return f"noise {self.rollbacks}" if self.rollbacks else "noise"

    def _check(self, step: int, value: float, grad_norm: float, learning_rate: float) -> None:
        limit = self.watch.limit()
        # with fp16 a gradient overflow is the scaler's business: it skips the step and lowers its scale
        scaled = self.accelerator.scaler is not None
        if math.isfinite(value) and value <= limit and (scaled or math.isfinite(grad_norm)):
            return
        self.packed.zero_grad()
        if scaled:
            self.accelerator.scaler.update()  # else it believes that the next step's gradients are unscaled already
        above = f", above {limit:.4g} = training.stop_above times the median of the last" if value > limit else ""
        report = {
            "step": step,
            "loss": value,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "noise_stream": self.noise_stream,
            "losses_before": list(self.watch.losses),
            "batch_indices": self.batches.indices(step).tolist(),
        }
        raise TrainingDiverged(f"loss {value}, gradient norm {grad_norm} at step {step}{above}", report)


@noticing_lost_processes()
def fit(
    trainer: Trainer,
    *,
    first_step: int,
    on_step: Callable[[StepMetrics], None],
    on_checkpoint: Callable[[int], None],
    on_sample: Callable[[int], None] = lambda step: None,
    signal: Callable[[], int] = lambda: 0,
) -> int:
    """Train from first_step to the last, or until a signal; returns its number, or 0 at the end.

    signal() is the number of the signal that this process has got, or 0; one to any process stops all after the same step.

    on_checkpoint, and after it on_sample, run with the averaged weights in place; where the run is stopped between two
    checkpoints, on_checkpoint alone.
    """
    settings = trainer.settings
    for step in range(first_step, settings.num_training_steps + 1):
        on_step(trainer.step(step))
        stop = largest(trainer.accelerator, signal())
        if settings.is_due(step) or stop:
            with averaged(trainer):
                on_checkpoint(step)
                if settings.is_due(step):
                    on_sample(step)
        if stop:
            return stop
    return 0


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """Within this block the model is whole, holds the averaged weights and is in evaluation mode."""
    trainer.model.eval()
    with trainer.ema.in_place(), trainer.sources.whole_model():
        yield
    trainer.model.train()


def by_relative_rate(trainable: Mapping[str, nn.Parameter], config: DictConfig) -> dict[float, list[nn.Parameter]]:
    """The parameters by their learning rate over optimizer.learning_rate.

    That is `optimizer.lora_plus_ratio` for a lora_B ([LoRA+] section 4), `text_encoder_lora.learning_rate` over the rate
    of the others for the text encoder, the product of both for a lora_B there, `textual_inversion.learning_rate` over it
    for learned words, and 1 for all the rest.
    """
    of_b = config.optimizer.lora_plus_ratio or 1.0
    sections = {"text_encoder.": "text_encoder_lora", "text_encoder.learned_embedding": "textual_inversion"}
    rates = {prefix: OmegaConf.select(config, f"{name}.learning_rate") for prefix, name in sections.items()}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        rate = next((rates[prefix] for prefix in reversed(rates) if name.startswith(prefix)), None)
        relative = 1.0 if rate is None else rate / config.optimizer.learning_rate
        relative *= of_b if ".lora_B." in name else 1.0
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
