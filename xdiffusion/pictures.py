"""Pictures of batches: captioned grids, side-by-side columns, films. All take images (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from xdiffusion.data.image_set import to_uint8

SHORT_SIDE = 72  # small images are enlarged by a whole factor to at least this
MARGIN = 6
LINES, LINE = 3, 15  # of a caption at most, and the height of one
FIRST, LAST = 800, 2000  # milliseconds of a film's ends
PAPER, INK = (246, 246, 244), (40, 40, 40)


def grid(
    images: Float[Tensor, "B C H W"], captions: Sequence[str] | None = None, *, columns: int, title: str = ""
) -> Image.Image:
    """Images in rows of `columns`, each above its caption."""
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    font = ImageFont.load_default(10)
    texts = [_lines(caption, width, font) for caption in captions or []]
    foot = LINE * max((len(lines) for lines in texts), default=0)
    head = 20 if title else 0
    rows = -(-len(tiles) // columns)
    size = (MARGIN + columns * (width + MARGIN), head + MARGIN + rows * (height + foot + MARGIN))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, 4), title, fill=INK, font=ImageFont.load_default(13))
    for i, tile in enumerate(tiles):
        x = MARGIN + i % columns * (width + MARGIN)
        y = head + MARGIN + i // columns * (height + foot + MARGIN)
        page.paste(tile, (x, y))
        for j, text in enumerate(texts[i] if texts else []):
            draw.text((x + width // 2, y + height + 1 + LINE * j), text, INK, font, anchor="ma")
    return page


def labelled_rows(batches: Sequence[Float[Tensor, "B C H W"]], labels: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """One row of images per batch with its label at the left, and the captions of the columns below the last."""
    font = ImageFont.load_default(13)
    left = int(max(font.getlength(label) for label in labels)) + 2 * MARGIN
    pages = [grid(batch, captions if i == len(batches) - 1 else None, columns=len(batch)) for i, batch in enumerate(batches)]
    page = Image.new("RGB", (left + pages[0].width, sum(p.height for p in pages)), PAPER)
    draw = ImageDraw.Draw(page)
    y = 0
    for part, label in zip(pages, labels):
        page.paste(part, (left, y))
        draw.text((MARGIN, y + pages[0].height // 2), label, INK, font, anchor="lm")
        y += part.height
    return page


def strength_label(share: float, scales: Sequence[float]) -> str:
    """What the LoRAs' strengths are at a share of their scales: one number where they are equal."""
    strengths = [f"{share * scale:g}" for scale in scales]
    return "LoRA x " + " + ".join(strengths if len(set(strengths)) > 1 else strengths[:1]) if share else "base"


def save_png(page: Image.Image, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG with text metadata."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, format="PNG", pnginfo=info)


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a PNG, as `save_png` writes it.

    Raises:
        ValueError: if it is missing, no PNG, or a damaged one.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(None, "it is no file")  # but a pipe or a device, which has no end
        with path.open("rb") as file:
            return _read_text(file)
    except OSError as error:  # UnidentifiedImageError is one
        raise ValueError(f"{path} cannot be read as a PNG: {error.strerror or 'it is none'}") from error
    except Exception as error:  # Pillow fails on damaged files with whatever its reading happens to hit
        raise ValueError(f"{path} cannot be read as a PNG: {shorten(str(error), 100, placeholder='...')}") from error


def _read_text(file: BinaryIO) -> dict[str, str]:
    """The texts before the pixels, where `save_png` puts them: nothing is decoded to look for more behind them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on many pixels
        with Image.open(file, formats=["PNG"]) as picture:
            return {key: value for key, value in picture.info.items() if isinstance(value, str)}


def image_tensor(picture: Image.Image, shape: tuple[int, int, int]) -> Float[Tensor, "1 C H W"]:
    """A picture in [-1, 1], scaled to cover the (C, H, W) of `shape` and cut around its centre; C is 1 or 3."""
    channels, height, width = shape
    picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    levels = np.asarray(picture, dtype=np.float32).reshape(height, width, channels) / 127.5 - 1
    return torch.from_numpy(levels).permute(2, 0, 1)[None]


def mask_tensor(picture: Image.Image, height: int, width: int) -> Float[Tensor, "1 1 H W"]:
    """1 where a picture is bright, 0 where it is dark, scaled and cut as `image_tensor` does."""
    picture = ImageOps.fit(picture.convert("L"), (width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(picture) > 127).float()[None, None]


def save_gif(pages: Sequence[Image.Image], path: Path, milliseconds: int = 120) -> None:
    """Write an endless film; the first frame stays for most of a second, the last for two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [FIRST, *[milliseconds] * (len(pages) - 2), LAST][-len(pages) :]
    pages[0].save(path, save_all=True, append_images=list(pages[1:]), duration=durations, loop=0)


def as_picture(image: Float[Tensor, "C H W"]) -> Image.Image:
    """One image in [-1, 1], pixel by pixel."""
    pixels = to_uint8(image[None])[0].permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels))


def _tile(image: Float[Tensor, "C H W"]) -> Image.Image:
    picture = as_picture(image)
    factor = max(1, -(-SHORT_SIDE // min(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _lines(caption: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The words in lines of at most `width` pixels; the last line ends where the room does."""
    lines = [""]
    for word in caption[: LINES * width].split():  # a caption may have any length, and each look at it takes as long
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(lines) < LINES and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fit(line, width, font) for line in lines]


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    text = text[:width]  # a letter has a pixel at least
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
