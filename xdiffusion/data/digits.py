"""`image/digits`: 1,797 handwritten digits that travel with the package, for a laptop without a download.

The source is the "Optical Recognition of Handwritten Digits" set (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, CC BY 4.0) in the 8x8, 17-level form that scikit-learn carries. Each digit is drawn at the asked size in
several slightly moved variants, by one bicubic resampling per variant, and its strokes are sharpened by a soft threshold.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from xdiffusion.data.captions import PROMPT_TABLES
from xdiffusion.data.image_set import ImageSet, Split, check_fits, in_blocks

TRAIN_SIZE = 1400
VARIANTS = 8
STROKE_SHARPNESS = 12.0
CONTENT = 0.8  # share of the image's side that the 8x8 source fills: a margin as MNIST has


def load_digits(image_size: int) -> ImageSet:
    """The embedded digits at image_size x image_size: 11,200 training and 3,176 held-out images of one channel.

    The split is by source digit (a fixed shuffle), so no held-out image is a moved copy of a training image.

    Raises:
        ValueError: if image_size is below 8, or so large that no memory is for them.
    """
    if image_size < 8:
        raise ValueError(f"image_size={image_size} must be at least 8 for image/digits")
    with (files("xdiffusion.data") / "digits.npz").open("rb") as file, np.load(file) as arrays:
        source = torch.from_numpy(arrays["images"]).float().div(16)[:, None]  # (1797, 1, 8, 8) in [0, 1]
        labels = torch.from_numpy(arrays["labels"]).long()
    check_fits("image/digits", VARIANTS * len(labels), 1, image_size)
    generator = torch.Generator().manual_seed(1797)
    order = torch.randperm(len(labels), generator=generator)
    drawn = torch.cat([_draw(source, image_size, generator) for _ in range(VARIANTS)]).unflatten(0, (VARIANTS, -1))

    def split(index: Tensor) -> Split:
        return Split(drawn[:, index].flatten(0, 1), labels[index].repeat(VARIANTS), VARIANTS)

    return ImageSet("image/digits", split(order[:TRAIN_SIZE]), split(order[TRAIN_SIZE:]), PROMPT_TABLES["image/digits"])


def _draw(source: Float[Tensor, "N 1 8 8"], size: int, generator: torch.Generator) -> UInt8[Tensor, "N 1 S S"]:
    """Each digit once, rotated, sheared, scaled and shifted a little at random."""
    n = len(source)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * limit

    angle, shear = uniform(0.12), uniform(0.12)
    scale = 1 / (CONTENT * (1 + uniform(0.08)))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos, -sin + shear * cos, uniform(0.06), sin, cos + shear * sin, uniform(0.06)]
    black = torch.sigmoid(torch.tensor(-STROKE_SHARPNESS / 2))

    def drawn(block: Tensor, moves: Tensor) -> Tensor:
        grid = F.affine_grid(moves, [len(block), 1, size, size], align_corners=False)
        moved = F.grid_sample(block, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        sharpened = torch.sigmoid(STROKE_SHARPNESS * (moved - 0.5))
        return ((sharpened - black) / (1 - 2 * black)).clamp(0, 1).mul(255).round().to(torch.uint8)

    blocks = zip(in_blocks(source, size), in_blocks(torch.stack(rows, dim=1).view(n, 2, 3), size))
    return torch.cat([drawn(*block) for block in blocks])
