"""Sample grids that a run draws of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from xdiffusion.checkpoints.files import write_atomically
from xdiffusion.data.captions import PromptTable
from xdiffusion.model import DiffusionModel, generate, generators_for
from xdiffusion.pictures import grid, save_png

ROWS = 2
PIXELS_AT_A_TIME = 512 * 512  # decoding as many takes 1 GB, which a card that trains at 512 may have, but not 8


def preview_prompts(table: PromptTable, rows: int = ROWS) -> list[str]:
    """`rows` differently worded prompts of each class, row by row."""
    return [captions[row % len(captions)] for row in range(rows) for captions in table.captions]


def draw_preview(
    model: DiffusionModel, table: PromptTable, sampling: Mapping[str, Any], path: Path | None, title: str, seed: int = 0
) -> Image.Image:
    """Sample every class twice, from the same noise each time, and write the captioned grid to `path`, if given."""
    prompts = preview_prompts(table)
    as_captions = {**sampling, "prompt_syntax": "plain"}  # a bracket in a caption is no weight
    _, height, width = model.image_shape
    at_a_time = max(1, PIXELS_AT_A_TIME // (height * width))
    images = generate(model, prompts, generators_for(seed, len(prompts)), batch_size=at_a_time, **as_captions)
    page = grid(images, prompts, columns=table.num_classes, title=title)
    metadata = {"prompts": "\n".join(prompts), "title": title}
    if path is not None:  # a run resumed takes it for whole
        write_atomically(path, lambda temporary: save_png(page, temporary, metadata))
    return page
