"""Pictures that a run draws of what its model can: sample grids, and the similarities of the tiny CLIP."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from xdiffusion.checkpoints.writing import write_atomically
from xdiffusion.data.captions import PromptTable
from xdiffusion.data.image_set import ImageSet
from xdiffusion.model import DiffusionModel, at_a_time, generate, generators_for, of_captions
from xdiffusion.pictures import grid, save_png
from xdiffusion.training.contrastive import ContrastiveModel, similarities

ROWS = 2


def preview_prompts(table: PromptTable) -> list[str]:
    """ROWS differently worded prompts of each class, row by row."""
    return [captions[row % len(captions)] for row in range(ROWS) for captions in table.captions]


def draw_sample_grid(
    model: DiffusionModel,
    table: PromptTable,
    sampling: Mapping[str, Any],
    path: Path | None,
    title: str,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    own: Sequence[str] = (),
) -> Image.Image:
    """Sample every class ROWS times, from the same noise each time, and write the captioned grid to `path`, if given.

    Args:
        autocast: see `generate`.
        own: prompts to draw in the place of the table's captions, in the prompt syntax of `sampling`, where captions are plain.
    """
    prompts, settings = ([*own] * ROWS, sampling) if own else (preview_prompts(table), of_captions(sampling))
    generators = generators_for(seed, len(prompts))
    images = generate(model, prompts, generators, batch_size=at_a_time(model), autocast=autocast, **settings)
    page = grid(images, prompts, columns=len(prompts) // ROWS, title=title)
    metadata = {"prompts": "\n".join(prompts), "title": title}
    if path is not None:  # a run resumed takes it for whole
        write_atomically(path, lambda temporary: save_png(page, temporary, metadata))
    return page


def draw_similarities(model: ContrastiveModel, data: ImageSet, path: Path | None, title: str) -> Image.Image:
    """The mean cosine of the held-out images of each class and the captions of each, a bright diagonal where it is learned."""
    from matplotlib.figure import Figure

    of_images, classes = similarities(model, data), data.prompts.num_classes
    means = torch.stack([of_images[data.test.labels == k].mean(0) for k in range(classes)])
    accuracy = (of_images.argmax(1) == data.test.labels).float().mean()
    names = [captions[0] for captions in data.prompts.captions]
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(means.numpy(), vmin=-1, vmax=1, cmap="RdBu_r"), label="cosine similarity")
    axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(classes), names)
    axes.set(xlabel="captions", ylabel="held-out images", title=f"{title}: zero-shot accuracy {float(accuracy):.3f}")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    if path is not None:
        write_atomically(path, lambda temporary: temporary.write_bytes(drawn.getvalue()))
    return Image.open(drawn).convert("RGB")
