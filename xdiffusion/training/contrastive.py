"""Contrastive training of our own tiny CLIP on (image, caption) pairs ([CLIP] section 2.3).

open_clip supplies the vision tower and the loss; the text tower is ours, and is what a diffusion model keeps. A batch is
a stack of groups, each with one image of every class: captions of one class are interchangeable, so a second image of the
class in the same contrast would be a false negative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from xdiffusion.data.image_set import ImageSet
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.training.loop import Trainer
from xdiffusion.training.randomness import after_rollbacks, generator_at
from xdiffusion.training.settings import OptimizerSettings, TrainingSettings
from xdiffusion.training.task import Place, Task


class ContrastiveModel(nn.Module):
    """A text tower and a vision tower with a common, normalised feature space.

    Args:
        text: our text encoder.
        image_size, channels: of the images, which are cut into 4x4 patches, or into fewer where 4 does not divide the size.
    """

    def __init__(self, text: CLIPTextEncoder, *, image_size: int, channels: int):
        from open_clip.transformer import VisionTransformer

        super().__init__()
        patch_size = next(side for side in range(max(1, image_size // 4), image_size + 1) if image_size % side == 0)
        self.channels = channels
        self.text = text
        self.visual = VisionTransformer(
            image_size=image_size,
            patch_size=patch_size,
            width=64,
            layers=2,
            heads=2,
            mlp_ratio=4.0,
            output_dim=text.text_projection.out_features,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self, images: Float[Tensor, "B C H W"], tokens: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"], Float[Tensor, ""]]:
        """Features of both towers, and what their products are multiplied by."""
        texts = F.normalize(self.text.pooled(tokens), dim=-1)
        return self.image_features(images), texts, self.logit_scale.exp().clamp(max=100)

    def image_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E"]:
        """Unit vectors; one-channel images are shown to the three-channel tower as grey."""
        return F.normalize(self.visual(images.expand(-1, 3, -1, -1)), dim=-1)

    def text_features(self, prompts: list[str]) -> Float[Tensor, "B E"]:
        return F.normalize(self.text.pooled(self.text.tokenize(prompts)), dim=-1)


class Pairs(NamedTuple):
    """Groups of one image of each class, with a caption of each: images (G K, C, H, W), tokens (G K, L)."""

    images: Float[Tensor, "N C H W"]
    tokens: Int[Tensor, "N L"]


class ContrastiveTask(Task[Pairs]):
    """The contrast of the images and captions of each group: the mean of the two cross-entropies ([CLIP] figure 3).

    `training.batch_size` counts pairs; `caption_dropout` and `gradient_checkpointing` have no effect.

    Args:
        model: the towers; the text tower's token table is frozen: most rows of the vocabulary are never used, and random
            rows tell words apart; it halves the time.
        data: pairs are drawn from its training split.
        settings, optimizer_settings: of the run.

    Raises:
        ValueError: if the classes do not divide the batch.
    """

    model: ContrastiveModel

    def __init__(
        self,
        model: ContrastiveModel,
        data: ImageSet,
        settings: TrainingSettings,
        optimizer_settings: OptimizerSettings,
    ):
        from open_clip.loss import ClipLoss

        model.text.token_embedding.weight.requires_grad_(False)
        self.model, self.network, self.data = model, model, data
        self.settings, self.optimizer_settings = settings, optimizer_settings
        classes = data.prompts.num_classes
        self.rows = settings.batch_size // classes
        if settings.batch_size % classes:
            raise ValueError(
                f"training.batch_size={settings.batch_size} of the tiny CLIP must be a multiple of {classes}: a group has "
                f"one image of each class of {data.name} (clip.training.batch_size)"
            )
        self.contrast = ClipLoss()
        self.by_class = [torch.nonzero(data.train.labels == k).flatten() for k in range(classes)]
        if empty := [data.prompts.captions[k][0] for k in range(classes) if not len(self.by_class[k])]:
            raise ValueError(f"{data.name} has no training image of {', '.join(empty)}: the tiny CLIP needs one of each class")

    def prepare(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.model.to(accelerator.device)

    def indices(self, place: Place) -> Int[Tensor, " B"]:
        generator = generator_at(self.settings.seed, after_rollbacks("pairs", place.rollbacks), place.step)
        columns = [of_class[torch.randint(len(of_class), (self.rows,), generator=generator)] for of_class in self.by_class]
        return torch.stack(columns, dim=1).flatten()

    def batch(self, place: Place) -> Pairs:
        size = self.settings.batch_size
        own = slice(place.part * size // place.parts, (place.part + 1) * size // place.parts)
        wording = torch.rand(size, generator=generator_at(self.settings.seed, "captions", place.step))
        batch = self.data.batch(self.indices(place)[own], wording[own])
        device = self.accelerator.device
        return Pairs(batch.images.to(device), self.model.text.tokenize(batch.captions).to(device))

    def part_loss(self, batch: Pairs, place: Place) -> Float[Tensor, ""]:
        with self.accelerator.autocast():
            images, texts, scale = self.network(*batch)
        groups = zip(*(features.float().unflatten(0, (-1, len(self.by_class))) for features in (images, texts)))
        return torch.stack([self.contrast(image, text, scale) for image, text in groups]).mean()


def train_contrastive(
    model: ContrastiveModel, data: ImageSet, settings: TrainingSettings, optimizer_settings: OptimizerSettings
) -> None:
    """Train the towers in place on the CPU, without leaving anything on the disk."""
    trainer = Trainer(ContrastiveTask(model, data, settings, optimizer_settings), force_cpu=True)
    for step in range(1, settings.num_training_steps + 1):
        trainer.step(step)


@torch.no_grad()
def similarities(model: ContrastiveModel, data: ImageSet) -> Float[Tensor, "N K"]:
    """Cosine of each held-out image and each class (its features averaged over its captions)."""
    texts = torch.stack([model.text_features(list(captions)).mean(0) for captions in data.prompts.captions])
    return torch.cat([model.image_features(x.to(texts.device)) @ texts.T for x in data.test.floats().split(512)]).cpu()


def zero_shot_accuracy(model: ContrastiveModel, data: ImageSet) -> float:
    """Share of held-out images nearest to a caption of their class."""
    return float((similarities(model, data).argmax(1) == data.test.labels).float().mean())
