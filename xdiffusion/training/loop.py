"""The training loop: one for base models, LoRAs, learned words and the tiny CLIP, which are tasks (see `task`).

A step: differentiate the task's loss, clip, AdamW, moving average. Every draw is a function of the seed and the step (see
`randomness`), so a resumed run repeats an uninterrupted one. Several processes take rows of the same global batch and of
its draws, and add their gradients up (see `processes`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from xdiffusion.lora.formed_weights import layers_to_form
from xdiffusion.training.clipping import clip_gradients
from xdiffusion.training.divergence import MOST_SKIPPED, LossWatch, TrainingDiverged
from xdiffusion.training.ema import EMA
from xdiffusion.training.optimizer import build_optimizer
from xdiffusion.training.packed_weights import LARGEST_PACKED, PackedWeights
from xdiffusion.training.processes import (
    check_precision,
    check_shares,
    largest,
    only_add_up_last,
    spread,
    summed,
)
from xdiffusion.training.randomness import generator_at
from xdiffusion.training.row_threads import RowThreads, shares_of_a_step
from xdiffusion.training.settings import OptimizerSettings
from xdiffusion.training.sharded_weights import check_can_be_sharded, local, shard
from xdiffusion.training.task import Place, Task, parameters_by_rate


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
        task: what is trained, and by which loss; its model is on the CPU.
        force_cpu: do not use an accelerator that is there.

    Raises:
        ValueError: for settings that cannot work together or on this device.
    """

    def __init__(self, task: Task, *, force_cpu: bool = False):
        self.task, self.model = task, task.model.train()
        self.settings, self.optimizer_settings = task.settings, task.optimizer_settings
        AcceleratorState._reset_state()  # else a second run in this process must have the first one's precision
        undivided = GradientAccumulationPlugin(num_steps=1)  # else an environment variable may divide the gradients
        self.accelerator = Accelerator(
            mixed_precision=self.settings.mixed_precision, cpu=force_cpu, gradient_accumulation_plugin=undivided
        )
        check_shares(self.accelerator, task)
        check_can_be_sharded(task)
        check_precision(self.accelerator, self.settings)
        self.sharded = self.settings.shard_weights and self.accelerator.num_processes > 1
        self.watch = LossWatch(self.settings.stop_above)
        self.overflows = 0  # steps in a row whose gradients were not finite
        self.rollbacks = 0  # how often the run went back; each time with other noise
        task.prepare(self.accelerator)
        if self.sharded:
            shard(task.network, self.accelerator.device)
        else:
            network = torch.compile(task.network) if self.settings.compile else task.network
            task.network = spread(self.accelerator, network)
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        in_network = set(map(id, task.network.parameters()))
        self.unwrapped = [p for p in self.trainable.values() if id(p) not in in_network]
        groups = parameters_by_rate(task, self.trainable)
        self.relative_rates = list(groups)
        # 8-bit AdamW has one scale for some values in a row: they must be of one weight
        self.packed = PackedWeights(groups, 0 if self.optimizer_settings.kind == "adamw8bit" else LARGEST_PACKED)
        self.ema = EMA(self.packed.updated, self.settings.ema_decay)
        self.optimizer = self.accelerator.prepare(build_optimizer(self.packed.groups.values(), self.optimizer_settings))
        shares = shares_of_a_step(task, self.accelerator.device, self.accelerator.num_processes)
        layers = layers_to_form(self.model)
        self.row_threads = RowThreads(self.trainable.values(), shares, layers) if shares > 1 else None

    def by_name(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of tensors like those that are updated (averages, say) what belongs to each trained weight, in the same memory."""
        parts = dict(zip(map(id, self.packed.parameters), self.packed.parts(tensors)))
        return {name: parts[id(parameter)] for name, parameter in self.trainable.items()}

    def step(self, step: int) -> StepMetrics:
        """Take optimizer step number `step` (the first is 1).

        Raises:
            TrainingDiverged: before any weight is changed by a loss or gradient that is not finite (with fp16 a gradient may
                be MOST_SKIPPED - 1 times in a row), or by a loss above `training.stop_above` times the median of those before.
        """
        with self.row_threads.as_one_of_them() if self.row_threads is not None else nullcontext():
            return self._step(step)

    def _step(self, step: int) -> StepMetrics:
        started = time.perf_counter()
        learning_rate = learning_rate_at(step, self.settings.num_training_steps, self.optimizer_settings)
        for group, relative_rate in zip(self.optimizer.param_groups, self.relative_rates):
            group["lr"] = relative_rate * learning_rate
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        # LoRA's dropout draws from the global generator, which must not depend on the steps before either; torch seeds all
        dropout = torch.default_generator if self.accelerator.device.type == "cpu" else torch
        stream = f"dropout {rank}" if rank else "dropout"
        dropout.manual_seed(generator_at(self.settings.seed, stream, step).initial_seed())
        parts, total = self.settings.gradient_accumulation_steps, 0.0
        for part in range(parts):
            with only_add_up_last(self.accelerator, self.task.network, part == parts - 1, self.sharded):
                total = total + self._backward_part(step, part * processes + rank, parts * processes)
        total = summed(self.accelerator, total, self.unwrapped)
        max_norm = self.optimizer_settings.max_grad_norm
        grad_norm = clip_gradients(self.accelerator, self.packed.updated, max_norm)
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
            places = [Place(step, part * shares + i, parts * shares, self.rollbacks) for i in range(shares)]
            batches = [self.task.batch(place) for place in places]  # by one thread: it is short and all Python
            return self.row_threads.backward(lambda i: self._share_of_loss(batches[i], places[i]))
        place = Place(step, part, parts, self.rollbacks)
        part_loss = self._share_of_loss(self.task.batch(place), place)
        # of sharded gradients torch takes the mean over the processes, not the sum
        self.accelerator.backward(part_loss * self.accelerator.num_processes if self.sharded else part_loss)
        return part_loss.detach()

    def _share_of_loss(self, batch: Any, place: Place) -> torch.Tensor:
        """What a part adds to the batch's mean loss."""
        return self.task.part_loss(batch, place) / place.parts

    def _check(self, step: int, value: float, grad_norm: float, learning_rate: float) -> None:
        limit = self.watch.limit()
        # with fp16 a gradient overflow is the scaler's business: it skips the step and lowers its scale
        scaled = self.accelerator.scaler is not None
        self.overflows = 0 if math.isfinite(grad_norm) else self.overflows + 1
        given_up = self.overflows >= (MOST_SKIPPED if scaled else 1)
        if math.isfinite(value) and value <= limit and not given_up:
            return
        again = f", of {self.overflows} steps in a row whose gradients overflow in fp16" if scaled and given_up else ""
        self.overflows = 0
        self.packed.zero_grad()
        if scaled:
            self.accelerator.scaler.update()  # else it believes that the next step's gradients are unscaled already
        above = f", above {limit:.4g} = training.stop_above times the median of the last" if value > limit else ""
        reason = f"loss {value}, gradient norm {grad_norm} at step {step}{above}{again}"
        raise self._diverged(reason, step, value, grad_norm, learning_rate)

    def check_weights(self, last: StepMetrics) -> None:
        """Before a checkpoint: an update that is too large for float32 shows in the loss of the step after it alone.

        Raises:
            TrainingDiverged: if a weight is not finite after the last step, in any process.
        """
        finite = torch.stack([torch.isfinite(local(p)).all() for p in self.trainable.values()]).all()
        if largest(self.accelerator, int(not finite)):
            reason = f"weights that are not finite after step {last.step}, learning rate {last.learning_rate:.4g}"
            raise self._diverged(reason, last.step, last.loss, last.grad_norm, last.learning_rate)

    def _diverged(self, reason: str, step: int, loss: float, grad_norm: float, learning_rate: float) -> TrainingDiverged:
        report = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "rollbacks": self.rollbacks,
            "losses_before": list(self.watch.losses),
            "batch_indices": self.task.indices(Place(step, rollbacks=self.rollbacks)).tolist(),
        }
        return TrainingDiverged(reason, report)


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

    Raises:
        TrainingDiverged: see `Trainer.step` and `Trainer.check_weights`.
    """
    settings = trainer.settings
    for step in range(first_step, settings.num_training_steps + 1):
        metrics = trainer.step(step)
        on_step(metrics)
        stop = largest(trainer.accelerator, signal())
        if settings.is_due(step) or stop:
            trainer.check_weights(metrics)
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
    with trainer.ema.in_place(), trainer.task.whole_model():
        yield
    trainer.model.train()


def learning_rate_at(step: int, last_step: int, settings: OptimizerSettings) -> float:
    """The learning rate of step 1..last_step: linear warm-up, then cosine or constant."""
    warmed = min(1.0, step / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return settings.learning_rate * warmed
    progress = max(0, step - settings.warmup_steps) / max(1, last_step - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * warmed * (settings.final_factor + (1 - settings.final_factor) * cosine)
