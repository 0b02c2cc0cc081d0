"""Latents and text embeddings computed once, before the first step, so that their models need not stay on the GPU.

    latents:     hash of the picture's bytes, shape, flip | hash and settings of the autoencoder -> (mean, std)
    embeddings:  caption | hash and settings of the text encoder -> (L, D)

Each step still draws its own latent from N(mean, std^2), and crops stay at the centre.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from xdiffusion.checkpoints.files import content_hash
from xdiffusion.checkpoints.tensor_cache import TensorCache
from xdiffusion.data.captioned_images import CaptionedImages, Crop
from xdiffusion.data.image_set import to_unit_range


class LatentCache:
    """(mean, std) of every picture of a collection in the shapes and flips that a run draws.

    Args:
        images: the pictures.
        autoencoder: with `posterior`; needed only now.
        cache: see `cache_for`.
        shapes: (height, width) that every picture is needed in; None for each in its own bucket's.

    Raises:
        ValueError: if the pictures are cropped at random, or the model has no latents.
        CheckpointError: if the cache's folder cannot be written.
    """

    def __init__(
        self,
        images: CaptionedImages,
        autoencoder: nn.Module,
        cache: TensorCache,
        shapes: Sequence[tuple[int, int]] | None = None,
    ):
        if not isinstance(images, CaptionedImages):
            raise ValueError(
                "cache.latents=true is for image/folder and image/hugging_face; other sets are small, or shards "
                "without an end"
            )
        if images.random_crop:
            raise ValueError("cache.latents=true keeps one latent of each picture, so data.random_crop must be false")
        self.cache = cache
        self.computed = 0
        self.entries: dict[tuple[int, tuple[int, int], bool], tuple[int, str]] = {}  # -> (picture, key)
        device = next(autoencoder.parameters(), torch.empty(0)).device
        for index in tqdm(range(len(images)), desc="latents", unit="picture", leave=False, disable=None):
            for shape in shapes or [images.sizes[index]]:
                for flip in (False, True) if images.flip else (False,):
                    self.entries[index, shape, flip] = self._entry(
                        images, index, Crop(flip), shape, autoencoder, device
                    )

    def _entry(
        self,
        images: CaptionedImages,
        index: int,
        crop: Crop,
        shape: tuple[int, int],
        autoencoder: nn.Module,
        device: torch.device,
    ) -> tuple[int, str]:
        """The picture that stands for this one (itself, if it is whole) and its key, computed where it is not there."""
        key = f"{images.pictures[index].content_hash()} {shape[0]}x{shape[1]} centre{' flipped' * crop.flip}"
        if self.cache.get(key) is not None:
            return index, key
        whole, pixels = images.load(index, crop, shape)
        if whole != index:
            return self._entry(images, whole, crop, shape, autoencoder, device)
        with torch.no_grad():
            mean, std = autoencoder.posterior(to_unit_range(pixels[None]).to(device))
        if std is None:
            raise ValueError("cache.latents=true needs an autoencoder: this model's pixels are its latents")
        self.cache.put(key, {"mean": mean[0].float(), "std": std[0].float()})
        self.computed += 1
        return index, key

    def batch(
        self, index: Tensor, crops: Sequence[Crop], shape: tuple[int, int]
    ) -> tuple[list[int], Float[Tensor, "b C h w"], Float[Tensor, "b C h w"]]:
        """The pictures (each itself, or what stands for it), their means and their standard deviations."""
        found = [self.entries[i, shape, crop.flip] for i, crop in zip(index.tolist(), crops)]
        stored = [self.cache.require(key) for _, key in found]
        mean, std = (torch.stack([tensors[name] for tensors in stored]) for name in ("mean", "std"))
        return [picture for picture, _ in found], mean, std


class EmbeddingCache:
    """list of B prompts -> (B, L, D), for prompts that were given at the beginning.

    Args:
        prompts: all that a run will ask for.
        encoder: the text encoder; needed only now.
        cache: see `cache_for`.
        device: of what it returns.
    """

    def __init__(self, prompts: Iterable[str], encoder: nn.Module, cache: TensorCache, device: torch.device):
        self.cache = cache
        self.device = device
        self.computed = 0
        for prompt in tqdm(dict.fromkeys(prompts), desc="captions", unit="caption", leave=False, disable=None):
            if cache.get(prompt) is None:
                with torch.no_grad():
                    cache.put(prompt, {"context": encoder.encode([prompt])[0].float()})
                self.computed += 1

    def __call__(self, prompts: list[str]) -> Float[Tensor, "B L D"]:
        return torch.stack([self.cache.require(prompt)["context"] for prompt in prompts]).to(self.device)


def cache_for(part: nn.Module, settings: Mapping[str, Any], folder: Path) -> TensorCache:
    """The cache of what a model's part computes: other weights or settings never find its entries.

    Args:
        part: the autoencoder or the text encoder.
        settings: its section of the config.
        folder: of all caches; this one's is below it.
    """
    return TensorCache(folder / settings["kind"], {"weights": content_hash(part.state_dict()), **settings})
