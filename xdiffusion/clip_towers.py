"""The two towers of a CLIP score: our own text encoder with a vision tower trained for it, or a published CLIP.

Both have `image_features(images)` and `text_features(prompts)`, unit vectors in a common space.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.data.image_set import ImageSet
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.text_encoders.open_clip import download_open_clip_weights
from xdiffusion.training.contrastive import ContrastiveModel, train_contrastive
from xdiffusion.training.settings import OptimizerSettings, TrainingSettings

TRAINING = TrainingSettings(num_training_steps=300, batch_size=80, ema_decay=0.0)
OPTIMIZER = OptimizerSettings(learning_rate=1e-3, betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=30)


def own_towers(text_encoder: CLIPTextEncoder, images: ImageSet, folder: Path) -> ContrastiveModel:
    """A model's frozen text encoder and a vision tower for it, trained on the first call and kept in `folder`.

    A checkpoint holds the text tower alone. The contrastive loss with the text tower frozen gives it its other half, from
    the training split; under a minute. The file's name holds a hash of the text encoder and of the images.

    Raises:
        CheckpointError: if the file that is kept is damaged.
    """
    fingerprint = content_hash({**text_encoder.state_dict(), "images": images.train.images})[:12]
    path = folder / images.name / f"vision_tower_{images.image_size}px_{fingerprint}.safetensors"
    text_encoder.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        towers = ContrastiveModel(text_encoder, image_size=images.image_size, channels=images.channels)
    if path.is_file():
        tensors, _ = load_safetensors(path)
        try:
            towers.visual.load_state_dict(tensors)
        except RuntimeError as error:
            reason = shorten(str(error), 200, placeholder="...")
            raise CheckpointError(f"{path} is no vision tower ({reason}); without it, one is trained") from error
    else:
        train_contrastive(towers, images, TRAINING, OPTIMIZER)
        save_safetensors(path, towers.visual.state_dict(), {"dataset": images.name})
    return towers.eval().requires_grad_(False)


class PublishedTowers(nn.Module):
    """One of open_clip's models.

    Args:
        name: MODEL/TAG, such as "ViT-B-32-quickgelu/openai".

    Raises:
        ValueError: if there is no such model or tag, or, within seconds, if it cannot be downloaded.
    """

    def __init__(self, name: str):
        import open_clip

        super().__init__()
        model_name, _, tag = name.partition("/")
        if open_clip.get_model_config(model_name) is None or not tag:
            raise ValueError(f"--clip {name!r} must be own, or MODEL/TAG of open_clip such as ViT-B-32-quickgelu/openai")
        weights = download_open_clip_weights(model_name, tag, "--clip", "name another one, or leave it out")
        self.clip = open_clip.create_model(model_name)
        self.clip.load_state_dict(weights)
        self.tokenize = open_clip.get_tokenizer(model_name)
        trained = open_clip.get_pretrained_cfg(model_name, tag)  # some were trained on images in [-1, 1]
        mean, std = trained.get("mean"), trained.get("std")
        statistics = torch.tensor([mean or open_clip.OPENAI_DATASET_MEAN, std or open_clip.OPENAI_DATASET_STD])
        self.register_buffer("mean_std", statistics.view(2, 1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def image_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E"]:
        """Of images in [-1, 1], enlarged to what the model sees."""
        size = self.clip.visual.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        larger = F.interpolate(images.expand(-1, 3, -1, -1), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = self.mean_std
        return self.clip.encode_image((larger.add(1).div(2) - mean) / std, normalize=True)

    def text_features(self, prompts: list[str]) -> Float[Tensor, "B E"]:
        return self.clip.encode_text(self.tokenize(prompts), normalize=True)
