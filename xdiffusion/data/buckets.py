"""Aspect-ratio buckets: a few shapes of equal area, so that pictures are cropped little and a batch is one tensor.

sides are multiples of `multiple`, height * width <= image_size^2 and as near to it as the multiples allow ([NAI])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

Size = tuple[int, int]  # (height, width)
MAX_ENLARGEMENT = 4


def bucket_sizes(image_size: int, multiple: int, max_aspect: float) -> list[Size]:
    """The shapes, from the tallest to the widest; the square is always among them.

    Args:
        image_size: side of the square; a multiple of `multiple`.
        multiple: of which every side is one.
        max_aspect: largest ratio of the long side to the short one; 1 leaves only the square.

    Raises:
        ValueError: for sizes that do not go together.
    """
    if image_size < 1 or multiple < 1 or image_size % multiple:
        raise ValueError(
            f"image_size={image_size} must be a multiple of bucket_multiple={multiple}, both above 0: set data.image_size or "
            "data.bucket_multiple"
        )
    if not 1 <= max_aspect < math.inf:
        raise ValueError(f"max_aspect={max_aspect} must be a number of at least 1")
    sizes = {(image_size, image_size)}
    for width in range(multiple, int(image_size * math.sqrt(max_aspect)) + multiple, multiple):
        tallest = min(image_size**2 // width, math.floor(width * max_aspect + 1e-9))
        height = tallest // multiple * multiple
        if height and max(height / width, width / height) <= max_aspect:
            sizes.add((height, width))
    return sorted(_largest(sizes), key=lambda size: size[1] / size[0])


def nearest_bucket(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The shape whose aspect ratio is nearest to the picture's, by the logarithm of their quotient."""
    return min(sizes, key=lambda size: abs(math.log(width / height * size[0] / size[1])))


def cover(image: Image.Image, size: Size) -> Image.Image:
    """Resize so that the picture just covers (height, width)."""
    height, width = size
    scale = enlargement(*image.size, size)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return image if covering == image.size else image.resize(covering, Image.Resampling.LANCZOS)


def crop(image: Image.Image, size: Size, top: float = 0.5, left: float = 0.5) -> Image.Image:
    """Cut off what a picture has over (height, width).

    Args:
        top, left: where the crop lies in what is over, 0 = upper left, 0.5 = centre, up to 1.
    """
    height, width = size
    x, y = round(left * (image.width - width)), round(top * (image.height - height))
    return image.crop((x, y, x + width, y + height))


def enlargement(width: int, height: int, size: Size) -> float:
    """The factor by which a picture is resized to cover (height, width)."""
    return max(size[1] / width, size[0] / height)


def _largest(sizes: set[Size]) -> list[Size]:
    """Without shapes that fit into another: two widths may round to one height."""
    return [a for a in sizes if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in sizes)]
