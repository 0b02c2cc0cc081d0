"""What a run reads its batches and contexts from: directly, or from caches after which the models leave the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.model import DiffusionModel
from xdiffusion.text_encoders.prompt_cache import PromptCache
from xdiffusion.training.batches import Batches, Data, Source
from xdiffusion.training.latent_cache import EmbeddingCache, LatentCache, cache_for
from xdiffusion.training.settings import CacheSettings, TrainingSettings, settings_of


class Sources:
    """The batches of a run and the contexts of its captions; puts the model's parts where the run needs them.

    A part whose results are cached is on the device only while it computes them, before the network is there.

    Args:
        model: on the CPU.
        data: the pictures.
        class_images: of prior preservation, or None.
        config: resolved, and of sections that go together, see `checks`.
        settings: its section `training`.
        device: to train on.

    Raises:
        ValueError: for a cache that this model cannot have.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: Data,
        class_images: CaptionedImages | None,
        config: DictConfig,
        settings: TrainingSettings,
        device: torch.device,
    ):
        cached = settings_of(config, "cache")
        self.device = device
        self.parked: list[nn.Module] = []
        sets = [data] if class_images is None else [data, class_images]
        weights = [1.0] if class_images is None else [1.0, config.prior.weight]
        latents = [None] * len(sets)
        if cached.latents:
            cache = cache_for(model.autoencoder, _section(config, "autoencoder"), Path(cached.folder))
            shapes = [None, list(data.buckets)] if class_images is not None else [None]
            with self._visiting(model.autoencoder):
                latents = [LatentCache(images, model.autoencoder, cache, s) for images, s in zip(sets, shapes)]
            damaged = sum(len(images.damaged) for images in sets)
            replaced = f"; {damaged} damaged pictures are replaced by others" if damaged else ""
            print(_said("latents", sum(images.computed for images in latents), cache.folder) + replaced)
        self.embed = self._embedder(model, sets, config, cached)
        sources = [Source(*source) for source in zip(sets, weights, latents)]
        self.batches = Batches(sources, model.autoencoder.posterior, settings, device)
        for part in (model.network, model.text_encoder, model.autoencoder):
            if part not in self.parked:
                part.to(device)

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Inside, every part of the model is on the device."""
        for part in self.parked:
            part.to(self.device)
        try:
            yield
        finally:
            for part in self.parked:
                part.to("cpu")

    def _embedder(
        self,
        model: DiffusionModel,
        sets: list[Data],
        config: DictConfig,
        cached: CacheSettings,
    ) -> Callable[[list[str]], Tensor]:
        if not cached.text_embeddings:
            trains_text = any(p.requires_grad for p in model.text_encoder.parameters())
            return model.text_encoder.encode if trains_text else PromptCache(model.text_encoder)
        cache = cache_for(model.text_encoder, _section(config, "text_encoder"), Path(cached.folder))
        prompts = ["", *(caption for images in sets for captions in images.captions for caption in captions)]
        with self._visiting(model.text_encoder):
            embed = EmbeddingCache(prompts, model.text_encoder, cache, self.device)
        print(_said("text embeddings", embed.computed, cache.folder))
        return embed

    @contextmanager
    def _visiting(self, part: nn.Module) -> Iterator[None]:
        """Within this block a part is on the device; it is parked on the CPU afterwards."""
        part.to(self.device)
        yield
        self.parked.append(part.to("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _section(config: DictConfig, part: str) -> dict:
    return OmegaConf.to_container(config.model[part])


def _said(what: str, computed: int, folder: Path) -> str:
    return f"{what}: {computed} computed, the others found, in {folder}"
