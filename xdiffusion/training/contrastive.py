"""Contrastive training of our own tiny CLIP on (image, caption) pairs ([CLIP] section 2.3).

open_clip supplies the vision tower and the loss; the text tower is ours, and is what a diffusion model keeps. A batch is
a stack of groups, each with one image of every class: captions of one class are interchangeable, so a second image of the
class in the same contrast would be a false negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xdiffusion.data.image_set import ImageSet
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.training.divergence import TrainingDiverged


class ContrastiveModel(nn.Module):
    """A text tower and a vision tower with a common, normalised feature space.

    Args:
        text: our text encoder.
        image_size, channels: of the images.
        patch_size: of the vision transformer; must divide image_size. None cuts the image into 4x4 patches.
        width, layers, heads: of the vision transformer.
    """

    def __init__(
        self,
        text: CLIPTextEncoder,
        *,
        image_size: int,
        channels: int,
        patch_size: int | None = None,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
    ):
        from open_clip.transformer import VisionTransformer

        super().__init__()
        patch_size = patch_size or image_size // 4
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}")
        self.channels = channels
        self.text = text
        self.visual = VisionTransformer(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=4.0,
            output_dim=text.text_projection.out_features,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E"]:
        """Unit vectors; one-channel images are shown to the three-channel tower as grey."""
        return F.normalize(self.visual(images.expand(-1, 3, -1, -1)), dim=-1)

    def text_features(self, prompts: list[str]) -> Float[Tensor, "B E"]:
        return F.normalize(self.text.pooled(self.text.tokenize(prompts)), dim=-1)


def train_contrastive(
    model: ContrastiveModel,
    data: ImageSet,
    *,
    steps: int = 300,
    groups: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train both towers in place.

    Args:
        model: the towers.
        data: pairs are drawn from its training split.
        steps, learning_rate: of AdamW with warm-up and cosine decay.
        groups: contrasts per step, each with one image of every class.
        seed: of the drawing.
        on_step: called as on_step(step, loss).

    Raises:
        TrainingDiverged: for a loss that is not finite.
    """
    from open_clip.loss import ClipLoss

    contrast = ClipLoss()
    generator = torch.Generator().manual_seed(seed)
    # Most rows of the vocabulary are never used, and random rows tell words apart: a frozen table halves the time.
    model.text.token_embedding.weight.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    warmup = 0.1 if steps > 10 else 0.3  # OneCycleLR divides by zero where its warm-up is one step, as 0.1 of 10 is
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=warmup)
    by_class = [torch.nonzero(data.train.labels == k).flatten() for k in range(data.prompts.num_classes)]
    for step in range(steps):
        index = _one_of_each_class(by_class, groups, generator).flatten()
        batch = data.batch(index, torch.rand(len(index), generator=generator))
        images = model.image_features(batch.images).unflatten(0, (groups, -1))
        texts = model.text_features(batch.captions).unflatten(0, (groups, -1))
        scale = model.logit_scale.exp().clamp(max=100)
        loss = torch.stack([contrast(i, t, scale) for i, t in zip(images, texts)]).mean()
        if not math.isfinite(value := loss.item()):
            report = {"step": step, "loss": value, "learning_rate": learning_rate, "batch_indices": index.tolist()}
            raise TrainingDiverged(f"the tiny CLIP's loss is {value} at step {step}: lower clip.learning_rate", report)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        one_cycle.step()
        if on_step is not None:
            on_step(step, value)


def _one_of_each_class(by_class: list[Tensor], groups: int, generator: torch.Generator) -> Int[Tensor, "G K"]:
    columns = [index[torch.randint(len(index), (groups,), generator=generator)] for index in by_class]
    return torch.stack(columns, dim=1)


@torch.no_grad()
def zero_shot_accuracy(model: ContrastiveModel, data: ImageSet) -> float:
    """Share of held-out images nearest to a caption of their class (class features averaged over captions)."""
    texts = torch.stack([model.text_features(list(captions)).mean(0) for captions in data.prompts.captions])
    guesses = [(model.image_features(x) @ texts.T).argmax(1) for x in data.test.floats().split(512)]
    return float((torch.cat(guesses) == data.test.labels).float().mean())
