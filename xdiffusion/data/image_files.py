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
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from xdiffusion.data.buckets import MAX_ENLARGEMENT, Size, cover, crop, enlargement

MAX_DECODED_BYTES = 256 * 2**20  # held at once while a picture is decoded, or twice its file
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # not EPS, for which Pillow runs another program
_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTERS = (5, 6, 7, 8)  # of the orientations, those that turn by a quarter
_SMALL_MODES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # bytes of a pixel in memory; of others 4
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")
_STRIP = 256  # rows that are converted at once


class DamagedImage(ValueError):
    """A picture that cannot be used, and why."""


@dataclass(frozen=True)
class Picture:
    """A picture before it is decoded.

    name: for messages. caption: None where there is none. open: its bytes as stored. uncaptioned: why there is no caption.
    """

    name: str
    caption: str | None
    open: Callable[[], io.BufferedIOBase]
    uncaptioned: str = "no caption"

    def size(self) -> tuple[int, int]:
        """(width, height) as shown, from the header alone.

        Raises:
            DamagedImage: if it is no image, or decoding it would take more than MAX_DECODED_BYTES.
        """
        with _opened(self) as file, _decoder(file) as image:
            (width, height), held = _stored_size(image), _decoding_bytes(image, file)
            allowed = max(MAX_DECODED_BYTES, 2 * file.seek(0, io.SEEK_END))
            if held > allowed:
                raise DamagedImage(
                    f"{width}x{height} ({width * height / 1e6:.0f} megapixels, {image.format} {image.mode}) would take "
                    f"{held / 2**20:.0f} MB of memory; allowed are {allowed / 2**20:.0f}"
                )
            return (height, width) if _orientation(image) in _QUARTERS else (width, height)

    def pixels(
        self, size: Size | None = None, top: float = 0.5, left: float = 0.5, *, background: str = "white"
    ) -> Image.Image:
        """The picture as shown: turned as its camera was, in RGB.

        Args:
            size: (height, width) to which it is scaled and cropped; None leaves it as it is.
            top, left: see `buckets.crop`.
            background: the colour that is seen where it is transparent.

        Raises:
            DamagedImage: if it cannot be decoded to its end, is too large (see `size`), or is deep grey of unknown brightness.
        """
        self.size()
        with _opened(self) as file, _decoder(file) as image:
            _orientation(image)  # Pillow remembers it as the header says it
            image.load()
            orientation = _orientation(image)  # of a TIFF, which Pillow has turned by now, it is 1
            shown = _in_rgb(image, background)
            if size is not None:  # before it is turned, which takes as much memory again
                shown = cover(shown, size[::-1] if orientation in _QUARTERS else size)
            if orientation in _TURNS:
                shown = shown.transpose(_TURNS[orientation])
            return shown if size is None else crop(shown, size, top, left)

    def content_hash(self) -> str:
        """A hash of the stored bytes: 32 hex digits."""
        with _opened(self) as file:
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def read_picture(path: str | Path, *, to_cover: Size | None = None, background: str = "white") -> Image.Image:
    """One file's picture as shown.

    Args:
        to_cover: see `check_enlargement`.
        background: see `Picture.pixels`.

    Raises:
        DamagedImage: naming the file, see `Picture.pixels` and `check_enlargement`.
    """
    picture = Picture(str(path), None, partial(open_file, Path(path)))
    try:
        if to_cover is not None:
            check_enlargement(*picture.size(), to_cover)
        return picture.pixels(background=background)
    except DamagedImage as error:
        raise DamagedImage(f"{path}: {error}") from error


def check_enlargement(width: int, height: int, size: Size) -> None:
    """See that a picture can be scaled to cover (height, width).

    Raises:
        DamagedImage: if it would be more than MAX_ENLARGEMENT times as large.
    """
    if enlargement(width, height, size) > MAX_ENLARGEMENT:
        raise DamagedImage(f"{width}x{height} would be enlarged more than {MAX_ENLARGEMENT} times to cover {size[1]}x{size[0]}")


def open_file(path: Path) -> io.BufferedIOBase:
    """A file's bytes, of a link too.

    Raises:
        DamagedImage: for what would never end, such as a pipe or a device.
        OSError: if there is none, or it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise DamagedImage("is no file")
    return path.open("rb")


@contextmanager
def _opened(picture: Picture) -> Iterator[io.BufferedIOBase]:
    try:
        with picture.open() as file:
            yield file
    except OSError as error:
        raise DamagedImage(f"cannot be read ({error.strerror or error})") from error


@contextmanager
def _decoder(file: io.BufferedIOBase) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on sizes (checked here) and on odd EXIF entries
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                yield image
    except Image.DecompressionBombError as error:
        raise DamagedImage(f"it has more than {2 * Image.MAX_IMAGE_PIXELS // 1_000_000} megapixels") from error
    except DamagedImage:
        raise
    except Exception as error:  # Pillow's decoders fail on damaged files with whatever their reading happens to hit
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known image format" if unknown else shorten(str(error), 100, placeholder="...")
        raise DamagedImage(f"cannot be read ({reason})") from error


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the rows in the file; of a TIFF some versions of Pillow give the size as shown."""
    return (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 is upright."""
    # not image.getexif(), which for a PNG decodes all of it to look behind the pixels
    return Image.Image.getexif(image).get(_ORIENTATION, 1)


def _decoding_bytes(image: Image.Image, file: io.BufferedIOBase) -> float:
    """What is held at once of the picture that a header announces: Pillow's pixels, and the larger of what it needs to
    decode them and what comes after, a copy in RGB and rows half scaled. The figures were measured."""
    pixels = image.width * image.height
    stored = pixels * _SMALL_MODES.get(image.mode, 4)
    after = pixels * (1 if _is_rgb(image) else 5)
    if image.format == "WEBP":
        return stored + max(after, pixels * 13.5)  # two canvases, the frame, and again as bytes
    if image.format in ("JPEG", "MPO") and _is_in_scans(file):
        _, across, down, _ = zip(*image.layer)
        blocks = sum(h * v for h, v in zip(across, down)) / (max(across) * max(down))
        return stored + max(after, pixels * 2 * blocks)
    if image.format == "TIFF" and image.tile[0][0] != "raw":
        tile = image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0)  # which may be larger than the picture
        after = max(after, max(pixels, tile) * 1.5 * sum(image.tag_v2.get(258, (8,))) / 8)
    return stored + max(after, stored if image.format == "TIFF" else 0)  # Pillow turns a TIFF itself


def _is_in_scans(file: io.BufferedIOBase) -> bool:
    """Whether a JPEG comes in several scans, so that the coefficients of all of it are held until the last."""
    file.seek(2)
    components = 0
    while (marker := file.read(2)) and marker[0] == 0xFF and not (marker[1] < 2 or 0xD0 <= marker[1] <= 0xD9):
        segment = file.read(int.from_bytes(file.read(2), "big") - 2)
        if marker[1] in (0xC0, 0xC1):  # a frame that is not progressive
            components = segment[5]
        elif marker[1] == 0xDA:
            return segment[0] < components or not components
    return True


def _is_rgb(image: Image.Image) -> bool:
    return image.mode == "RGB" and "transparency" not in image.info


def _in_rgb(image: Image.Image, background: str) -> Image.Image:
    """The picture itself, or a copy on a background that is made strip by strip: nothing else is held of it."""
    if _is_rgb(image):
        return image
    copy, white = Image.new("RGB", image.size), _white(image)
    negative = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0  # of 8 bits Pillow knows it
    for top in range(0, image.height, _STRIP):
        strip = (0, top, image.width, min(top + _STRIP, image.height))
        part = image.crop(strip)
        if image.mode in _DEEP_MODES:
            part = _in_8_bits(part, white, negative, image.info.get("transparency"))
        copy.paste(_laid_on(background, part), strip)
    return copy


def _white(image: Image.Image) -> int:
    """What a picture of deep grey means by white."""
    if image.mode == "F":
        return 1
    bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0] if image.format == "TIFF" else 16
    return 2 ** min(bits, 16) - 1  # in 32 bits some programs keep 16


def _in_8_bits(image: Image.Image, white: int, negative: bool, transparent: int | None) -> Image.Image:
    """Deep grey, which Pillow would clip at 255; of a negative 0 is white. A PNG may name a level that is transparent.

    Raises:
        DamagedImage: if its values are not from black to white.
    """
    values = np.asarray(image, dtype=np.float32)
    low, high = values.min(), values.max()  # NaN if there is one
    if not (low >= 0 and high <= white):
        kind = "float" if image.mode == "F" else "16 bits"
        raise DamagedImage(f"its values are from {low:g} to {high:g}, those of {kind} from 0 to {white}; convert it to 8 bits")
    seen = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    if negative:
        values = white - values
    grey = Image.fromarray((values * (255 / white) + 0.5).astype(np.uint8))
    return grey if seen is None else Image.merge("LA", (grey, seen))


def _laid_on(background: str, image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")
