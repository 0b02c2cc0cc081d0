"""Latents and text embeddings computed once, before the first step, so that their models need not stay on the GPU.

They are read from the disk when a step needs them; the embeddings of the first captions stay in memory.

    latents:     hash of the picture's bytes, shape, flip | hash and settings of the autoencoder -> (mean, std)
    embeddings:  caption | hash and settings of the text encoder -> (L, D)

Each step still draws its own latent from N(mean, std^2), and crops stay at the centre. Several processes share
the work: each goes through it in an order of its own, and finds what the others have computed by then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.tensor_cache import TensorCache
from xdiffusion.data.buckets import Size
from xdiffusion.data.captioned_images import CaptionedImages, Crop
from xdiffusion.data.image_files import DamagedImage
from xdiffusion.data.image_set import to_unit_range
from xdiffusion.training.processes import in_own_order

MAX_BYTES = 256 * 2**20  # of embeddings in memory; a caption of Stable Diffusion 1.5 has 0.24 MB


class LatentCache:
    """(mean, std) of every picture of a collection in the shapes and flips that a run draws.

    Args:
        images: the pictures, not cropped at random.
        autoencoder: with `posterior`; needed now, and later for entries that are gone from the disk meanwhile.
        cache: see `cache_for`.
        shapes: (height, width) that every picture is needed in; None for each in its own bucket's.

    Raises:
        ValueError: if the model has no latents.
        CheckpointError: if the cache's folder cannot be written.
    """

    def __init__(
        self,
        images: CaptionedImages,
        autoencoder: nn.Module,
        cache: TensorCache,
        shapes: Sequence[Size] | None = None,
    ):
        self.images = images
        self.autoencoder = autoencoder
        self.cache = cache
        self.computed = 0
        self.entries: dict[tuple[int, Size, bool], tuple[int, str]] = {}  # -> (picture, key)
        for index in tqdm(in_own_order(range(len(images))), desc="latents", unit="picture", leave=False, disable=None):
            content = self._content(index)  # a read of the whole file: once for all its shapes
            for shape in shapes or [images.sizes[index]]:
                for flip in (False, True) if images.flip else (False,):
                    if not content or not self._find(index, shape, flip, content):
                        self._compute(index, shape, flip)

    def _content(self, index: int) -> str:
        """A picture's hash; "" of a damaged one: what stands for it will be found or computed."""
        try:
            return self.images.pictures[index].content_hash()
        except DamagedImage:
            return ""

    def _find(self, index: int, shape: Size, flip: bool, content: str) -> bool:
        """Enter a picture's latents if they are on the disk."""
        key = _key(content, shape, flip)
        self.entries[index, shape, flip] = index, key
        return self.cache.holds(key)

    @torch.no_grad()
    def _compute(self, index: int, shape: Size, flip: bool) -> dict[str, Tensor]:
        """Enter a picture (if it is damaged, what stands for it) and its latents, encoded where the autoencoder is."""
        whole, pixels = self.images.load(index, Crop(flip), shape)
        key = _key(self.images.pictures[whole].content_hash(), shape, flip)
        self.entries[index, shape, flip] = whole, key
        if whole != index and (found := self.cache.get(key)) is not None:
            return found
        device = next(self.autoencoder.parameters(), torch.empty(0)).device
        mean, std = self.autoencoder.posterior(to_unit_range(pixels[None]).to(device))
        if std is None:
            raise ValueError("cache.latents=true needs an autoencoder: this model's pixels are its latents")
        tensors = {"mean": mean[0].float().cpu(), "std": std[0].float().cpu()}
        self.cache.put(key, tensors)
        self.computed += 1
        return tensors

    def _stored(self, index: int, shape: Size, flip: bool) -> dict[str, Tensor]:
        _, key = self.entries[index, shape, flip]
        if (tensors := self.cache.get(key)) is not None:
            return tensors
        print(f"warning: {self.cache.path(key)} is gone or damaged: it is computed again", file=sys.stderr)
        return self._compute(index, shape, flip)

    def batch(
        self, index: Int[Tensor, " b"], crops: Sequence[Crop], shape: Size
    ) -> tuple[list[int], Float[Tensor, "b C h w"], Float[Tensor, "b C h w"]]:
        """The pictures (each itself, or what stands for it), their means and their standard deviations."""
        wanted = [(i, shape, crop.flip) for i, crop in zip(index.tolist(), crops)]
        stored = [self._stored(*entry) for entry in wanted]
        mean, std = (torch.stack([tensors[name] for tensors in stored]) for name in ("mean", "std"))
        return [self.entries[entry][0] for entry in wanted], mean, std


def _key(content: str, shape: Size, flip: bool) -> str:
    return f"{content} {shape[0]}x{shape[1]} centre{' flipped' * flip}"


class EmbeddingCache:
    """list of B prompts -> (B, L, D), for prompts that were given at the beginning.

    Args:
        prompts: all that a run will ask for.
        encoder: the text encoder; needed now, and later for entries that are gone from the disk meanwhile.
        cache: see `cache_for`.
        device: of what it returns.
    """

    def __init__(self, prompts: Iterable[str], encoder: nn.Module, cache: TensorCache, device: torch.device):
        self.encoder = encoder
        self.cache = cache
        self.device = device
        self.computed = 0
        self.kept: dict[str, Tensor] = {}
        once = in_own_order(list(dict.fromkeys(prompts)))
        for prompt in tqdm(once, desc="captions", unit="caption", leave=False, disable=None):
            if not cache.holds(prompt):
                self._compute(prompt)

    @torch.no_grad()
    def _compute(self, prompt: str) -> Float[Tensor, "L D"]:
        context = self.encoder.encode([prompt])[0].float().cpu()
        self.cache.put(prompt, {"context": context})
        self.computed += 1
        return context

    def _stored(self, prompt: str) -> Float[Tensor, "L D"]:
        if prompt in self.kept:
            return self.kept[prompt]
        if (tensors := self.cache.get(prompt)) is not None:
            context = tensors["context"]
        else:
            print(f"warning: {self.cache.path(prompt)} is gone or damaged: it is computed again", file=sys.stderr)
            context = self._compute(prompt)
        if (1 + len(self.kept)) * context.nbytes <= MAX_BYTES:
            self.kept[prompt] = context
        return context

    def __call__(self, prompts: list[str]) -> Float[Tensor, "B L D"]:
        return torch.stack([self._stored(prompt) for prompt in prompts]).to(self.device)


def cache_for(part: nn.Module, settings: Mapping[str, Any], folder: Path) -> TensorCache:
    """The cache of what a model's part computes: other weights or settings never find its entries.

    Args:
        part: the autoencoder or the text encoder.
        settings: its section of the config.
        folder: of all caches; this one's is below it.
    """
    return TensorCache(folder / settings["kind"], {"weights": content_hash(part.state_dict()), **settings})
