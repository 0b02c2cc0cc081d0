"""What a run trains, and by which loss: the seam between the training loop, which knows no model, and the models.

A diffusion model, its LoRA, a learned word (`diffusion_task`) and the tiny CLIP (`contrastive`) are trained by one loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from xdiffusion.training.settings import OptimizerSettings, TrainingSettings

Batch = TypeVar("Batch")


class Place(NamedTuple):
    """Which part of what: step counts from 1, and the step's batch is cut into `parts` equal ones.

    rollbacks: how often the run went back after it had diverged; each time it draws anew what made it diverge.
    """

    step: int
    part: int = 0
    parts: int = 1
    rollbacks: int = 0


class Task(ABC, Generic[Batch]):
    """A model, its data, and the loss of a part of a step's batch.

    Every draw must be a function of the seed and the step, made for the whole batch (see `randomness`): so a run can be
    resumed, and does not depend on how its batches are cut.

    Attributes:
        model: its weights that require gradients are trained, all others are left alone.
        network: the part of it that `part_loss` calls; the loop replaces it by a compiled one, or one that adds up the
            gradients of several processes.
        data: what is trained on.
        class_images: what is trained on beside it, for prior preservation; None of most runs.
        settings, optimizer_settings: of the run.
        rows: into how many equal parts a batch can be cut at most.
    """

    model: nn.Module
    network: nn.Module
    data: Any
    class_images: Any = None
    settings: TrainingSettings
    optimizer_settings: OptimizerSettings
    rows: int

    @abstractmethod
    def prepare(self, accelerator: Accelerator) -> None:
        """Put the model on the accelerator's device; part_loss computes under its autocast.

        Raises:
            ValueError: for settings that cannot work together or on this device.
        """

    @abstractmethod
    def indices(self, place: Place) -> Int[Tensor, " B"]:
        """Which samples a step sees, all of its batch."""

    @abstractmethod
    def batch(self, place: Place) -> Batch:
        """What `part_loss` needs of a part of a batch."""

    @abstractmethod
    def part_loss(self, batch: Batch, place: Place) -> Tensor:
        """The mean loss of a part."""

    def relative_rate(self, name: str) -> float:
        """The learning rate of a trained weight over optimizer.learning_rate."""
        return 1.0

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Inside, every part of the model is on the device."""
        yield


def parameters_by_rate(task: Task, trainable: dict[str, nn.Parameter]) -> dict[float, list[nn.Parameter]]:
    """The trained weights by their learning rate over optimizer.learning_rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault(task.relative_rate(name), []).append(parameter)
    return groups
