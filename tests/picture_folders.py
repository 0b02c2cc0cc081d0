"""Folders of pictures that tests draw, and what is read of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.data.image_folder import load_image_folder

SMALL = {"image_size": 16, "bucket_multiple": 4}
CENTRE = torch.full((3, 1), 0.5)


def load(folder: Path, **settings) -> CaptionedImages:
    """The pictures of a folder, cut to 16x16 and shapes of that area."""
    return load_image_folder(data_dir=str(folder), **SMALL | settings)


def captions(images: CaptionedImages) -> dict[str, str]:
    """The first caption of each picture, by its name."""
    return {p.name: c[0] for p, c in zip(images.pictures, images.captions)}


def write_pictures(
    folder: Path, sizes: Sequence[tuple[int, int]], captions: Sequence[str] | None = None, seed: int = 0
) -> list[Path]:
    """picture_0.png, picture_1.png, ... of random pixels, (width, height) each, with captions in .txt files."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    paths = []
    for i, (width, height) in enumerate(sizes):
        path = folder / f"picture_{i}.png"
        Image.fromarray(numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        if captions:
            path.with_suffix(".txt").write_text(captions[i % len(captions)])
        paths.append(path)
    return paths


def truncate(path: Path, share: float = 0.5) -> None:
    """Cut a file's end off, so that its header is whole and its body is not."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def write_discs(folder: Path, count: int, size: int, colours: Mapping[str, tuple[int, int, int]]) -> None:
    """Discs on grey, the colours in turn, each captioned by its colour's name."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    names = list(colours)
    for i in range(count):
        name = names[i % len(names)]
        pixels = np.full((size, size, 3), 60 + 5 * (i % 3), dtype=np.uint8)
        pixels[x**2 + y**2 < (size * (0.25 + 0.02 * (i % 4))) ** 2] = colours[name]
        Image.fromarray(pixels).save(folder / f"disc_{i}.png")
        (folder / f"disc_{i}.txt").write_text(f"a {name} disc")
