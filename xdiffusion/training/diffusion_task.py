"""Training a diffusion model, or what adapts one: a LoRA, a learned word.

A part's loss: pick the rows, embed their captions, and take the objective of `diffusion.objective`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from accelerate import Accelerator
from jaxtyping import Float, Int
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.diffusion.objective import loss
from xdiffusion.model import DiffusionModel
from xdiffusion.training.batches import Data, Part
from xdiffusion.training.randomness import after_rollbacks, generator_at
from xdiffusion.training.settings import settings_of
from xdiffusion.training.sources import Sources
from xdiffusion.training.task import Place, Task

RATES = {"text_encoder.learned_embedding": "textual_inversion", "text_encoder.": "text_encoder_lora"}


class DiffusionTask(Task[Part]):
    """The denoising objective of a config on a data set.

    Args:
        model: on the CPU.
        data: the images and captions.
        config: resolved.
        class_images: of prior preservation, half of every batch; None for none.

    Raises:
        ValueError: for settings that no run can have.
    """

    model: DiffusionModel

    def __init__(self, model: DiffusionModel, data: Data, config: DictConfig, *, class_images: CaptionedImages | None = None):
        self.model, self.network, self.data, self.config = model, model.network, data, config
        self.class_images = class_images
        self.settings = settings_of(config, "training")
        self.optimizer_settings = settings_of(config, "optimizer")
        if self.settings.gradient_checkpointing and not hasattr(self.network, "gradient_checkpointing"):
            raise ValueError(f"training.gradient_checkpointing=true: a {config.model.network.kind} has no such switch")
        self.rows = self.settings.batch_size
        self.objective = {key: value for key, value in config.diffusion.items() if key != "schedule"}
        self.embedding_lock = Lock()  # a cache of embeddings grows as it is asked, by several threads

    def prepare(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.model.network.gradient_checkpointing = self.settings.gradient_checkpointing
        self.sources = Sources(self.model, self.data, self.class_images, self.config, self.settings, accelerator.device)
        self.batches, self.embed = self.sources.batches, self.sources.embed

    def indices(self, place: Place) -> Int[Tensor, " B"]:
        return self.batches.indices(place.step)

    def batch(self, place: Place) -> Part:
        return self.batches.part(place.step, place.part, place.parts)

    def part_loss(self, batch: Part, place: Place) -> Float[Tensor, ""]:
        noise = generator_at(self.settings.seed, after_rollbacks("noise", place.rollbacks), place.step)
        with self.embedding_lock:
            context = self.embed(batch.captions)
        with self.accelerator.autocast():
            return loss(
                self.network,
                self.model.schedule,
                x0=batch.x0,
                context=context,
                weights=batch.weights,
                generator=noise,
                share=(place.part, place.parts),
                **self.objective,
            )

    def relative_rate(self, name: str) -> float:
        """`optimizer.lora_plus_ratio` for a lora_B ([LoRA+] section 4), `text_encoder_lora.learning_rate` over the rate of
        the others for the text encoder, the product of both for a lora_B there, and `textual_inversion.learning_rate` over
        it for learned words."""
        section = next((section for prefix, section in RATES.items() if name.startswith(prefix)), None)
        own = OmegaConf.select(self.config, f"{section}.learning_rate") if section else None
        relative = 1.0 if own is None else own / self.optimizer_settings.learning_rate
        return relative * (self.optimizer_settings.lora_plus_ratio or 1.0) if ".lora_B." in name else relative

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        with self.sources.whole_model():
            yield
