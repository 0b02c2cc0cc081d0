"""Sample grids that a run draws of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from xdiffusion.data.captions import PromptTable
from xdiffusion.model import DiffusionModel, generate, generators_for
from xdiffusion.pictures import grid, save_png

ROWS = 2


def preview_prompts(table: PromptTable, rows: int = ROWS) -> list[str]:
    """`rows` differently worded prompts of each class, row by row."""
    return [captions[row % len(captions)] for row in range(rows) for captions in table.captions]


def draw_preview(
    model: DiffusionModel, table: PromptTable, sampling: Mapping[str, Any], path: Path, title: str, seed: int = 0
) -> Image.Image:
    """Sample every class twice, from the same noise each time, and write the captioned grid to `path`."""
    prompts = preview_prompts(table)
    images = generate(model, prompts, generators_for(seed, len(prompts)), **sampling)
    page = grid(images, prompts, columns=table.num_classes, title=title)
    save_png(page, path, {"prompts": "\n".join(prompts), "title": title})
    return page
