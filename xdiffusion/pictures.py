"""Pictures of batches: captioned grids, side-by-side columns, films. All take images (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

SHORT_SIDE = 72  # small images are enlarged by a whole factor to at least this
MARGIN = 6
PAPER, INK = (246, 246, 244), (40, 40, 40)


def grid(
    images: Float[Tensor, "B C H W"], captions: Sequence[str] | None = None, *, columns: int, title: str = ""
) -> Image.Image:
    """Images in rows of `columns`, each above its caption."""
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    font = ImageFont.load_default(11)
    line = 15 if captions else 0
    head = 20 if title else 0
    rows = -(-len(tiles) // columns)
    size = (MARGIN + columns * (width + MARGIN), head + MARGIN + rows * (height + line + MARGIN))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, 4), title, fill=INK, font=ImageFont.load_default(13))
    for i, tile in enumerate(tiles):
        x = MARGIN + i % columns * (width + MARGIN)
        y = head + MARGIN + i // columns * (height + line + MARGIN)
        page.paste(tile, (x, y))
        if captions:
            draw.text((x + width // 2, y + height + 1), _fit(captions[i], width, font), INK, font, anchor="ma")
    return page


def labelled_rows(
    batches: Sequence[Float[Tensor, "B C H W"]], labels: Sequence[str], captions: Sequence[str]
) -> Image.Image:
    """One row of images per batch with its label at the left, and the captions of the columns below the last."""
    font = ImageFont.load_default(13)
    left = int(max(font.getlength(label) for label in labels)) + 2 * MARGIN
    pages = [
        grid(batch, captions if i == len(batches) - 1 else None, columns=len(batch)) for i, batch in enumerate(batches)
    ]
    page = Image.new("RGB", (left + pages[0].width, sum(p.height for p in pages)), PAPER)
    draw = ImageDraw.Draw(page)
    y = 0
    for part, label in zip(pages, labels):
        page.paste(part, (left, y))
        draw.text((MARGIN, y + pages[0].height // 2), label, INK, font, anchor="lm")
        y += part.height
    return page


def save_png(page: Image.Image, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG with text metadata."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, pnginfo=info)


def save_gif(pages: Sequence[Image.Image], path: Path, milliseconds: int = 120) -> None:
    """Write an endless film; the last frame stays for two seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [milliseconds] * (len(pages) - 1) + [2000]
    pages[0].save(path, save_all=True, append_images=list(pages[1:]), duration=durations, loop=0)


def _tile(image: Float[Tensor, "C H W"]) -> Image.Image:
    pixels = image.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels))
    factor = max(1, -(-SHORT_SIDE // min(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
