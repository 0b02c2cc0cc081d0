"""One picture of a user's collection: where its bytes come from, what its header says, and its pixels.

Headers are read at the start of a run, pixels when a step needs them. Nothing here trusts a file: whatever is wrong with
one becomes a `DamagedImage` that says what.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_MEGAPIXELS = 64
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # not EPS, for which Pillow runs another program
_ORIENTATION = 0x0112  # EXIF: 5..8 are turned by a quarter
_BACKGROUND = (255, 255, 255, 255)


class DamagedImage(ValueError):
    """A picture that cannot be used, and why."""


@dataclass(frozen=True)
class Picture:
    """A picture before it is decoded.

    name: for messages. caption: None where there is none. open: its bytes as stored.
    """

    name: str
    caption: str | None
    open: Callable[[], io.BufferedIOBase]

    def size(self) -> tuple[int, int]:
        """(width, height) as shown, from the header alone.

        Raises:
            DamagedImage: if it is no image, or has more than MAX_MEGAPIXELS.
        """
        with _decoder(self) as image:
            width, height = image.size
            # not image.getexif(), which for a PNG decodes all of it to look behind the pixels
            turned = Image.Image.getexif(image).get(_ORIENTATION, 1) >= 5
        if width * height > MAX_MEGAPIXELS * 1_000_000:
            raise DamagedImage(f"{width}x{height} is above {MAX_MEGAPIXELS} megapixels")
        return (height, width) if turned else (width, height)

    def pixels(self) -> Image.Image:
        """The picture as shown: turned as its camera was, in RGB, on white where it is transparent.

        Raises:
            DamagedImage: if it cannot be decoded to its end, or is too large (see `size`).
        """
        self.size()
        with _decoder(self) as image:
            return _on_white(ImageOps.exif_transpose(image))

    def content_hash(self) -> str:
        """A hash of the stored bytes: 32 hex digits."""
        with _opened(self) as file:
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


@contextmanager
def _opened(picture: Picture) -> Iterator[io.BufferedIOBase]:
    try:
        with picture.open() as file:
            yield file
    except OSError as error:
        raise DamagedImage(f"cannot be read ({error.strerror or error})") from error


@contextmanager
def _decoder(picture: Picture) -> Iterator[Image.Image]:
    with _opened(picture) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, on sizes (checked here) and on odd EXIF entries
                with Image.open(file, formats=FORMATS) as image:
                    yield image
        except Image.DecompressionBombError as error:
            raise DamagedImage(f"it is above {MAX_MEGAPIXELS} megapixels") from error
        except DamagedImage:
            raise
        except Exception as error:  # Pillow's decoders fail on damaged files with whatever their reading happens to hit
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "no known image format" if unknown else " ".join(str(error).split())[:100]
            raise DamagedImage(f"cannot be read ({reason})") from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I", "F"):  # Pillow would clip them at 255 rather than scale them
        image = image.convert("F")
        _, highest = image.getextrema()
        image = image.point(lambda value: value * (255 / max(highest, 255.0)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image)
    return image.convert("RGB")
