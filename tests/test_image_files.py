"""One picture: what it looks like however it is stored, and what decoding it takes."""

import io
import struct
import sys
import zlib
from functools import partial

import numpy as np
import pytest
from commands import ROOT
from PIL import Image, TiffImagePlugin

from xdiffusion.data import image_files
from xdiffusion.data.buckets import cover, crop
from xdiffusion.data.image_files import DamagedImage, Picture, _is_in_scans, read_picture

sys.path.append(str(ROOT / "bench"))
from measure import peak_resident

JPEG = {"quality": 90}
STORED = {  # mode, format, options
    "photograph": ("RGB", "JPEG", JPEG),
    "progressive": ("RGB", "JPEG", {**JPEG, "progressive": True}),
    "progressive, full colour": ("RGB", "JPEG", {**JPEG, "progressive": True, "subsampling": 0}),
    "print": ("CMYK", "JPEG", {**JPEG, "progressive": True}),
    "png": ("RGB", "PNG", {"compress_level": 1}),
    "transparent": ("RGBA", "PNG", {"compress_level": 1}),
    "grey": ("L", "PNG", {"compress_level": 1}),
    "deep grey": ("I;16", "PNG", {"compress_level": 1}),
    "palette": ("P", "PNG", {"compress_level": 1, "transparency": 0}),
    "webp": ("RGB", "WEBP", {"method": 0}),
    "lossless webp": ("RGBA", "WEBP", {"method": 0, "lossless": True, "quality": 0}),
    "one strip": ("RGB", "TIFF", {"compression": "tiff_lzw", "tiffinfo": {278: 4000}}),
    "raw": ("CMYK", "TIFF", {}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
}


def stored(mode, format, options, side, height=None):
    """A photograph's bytes: smooth, with some noise; a square if no height is given."""
    small = np.random.default_rng(0).integers(0, 255, (side // 20, side // 20, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((side, height or side))
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if "16" in mode else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(100)
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(content):
    return Picture("picture", "words", lambda: io.BytesIO(content))


@pytest.mark.parametrize("kind", STORED)
def test_a_picture_takes_no_more_memory_than_its_header_lets_expect(kind, monkeypatch):
    side, spare = 2000, 6 * 2**20  # what every decoder has beside the pixels
    shown = picture(stored(*STORED[kind], side))
    expected = []
    original = image_files._decoding_bytes
    monkeypatch.setattr(image_files, "_decoding_bytes", lambda *given: expected.append(original(*given)) or expected[-1])
    taken = peak_resident(lambda: shown.pixels((64, 64)))
    assert taken < expected[0] + spare


@pytest.mark.parametrize("kind", ["photograph", "progressive, full colour", "png", "transparent", "palette", "grey"])
def test_photographs_of_24_megapixels_can_be_read(kind):
    """Of 48 too, as most of them are stored."""
    content = bytearray(stored(*STORED[kind], 200))
    sizes = [(6000, 4000)] + [(8064, 6048)] * (kind in ("photograph", "png"))
    for width, height in sizes:
        if content.startswith(b"\x89PNG"):
            content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
            content[29:33] = (zlib.crc32(content[12:29])).to_bytes(4, "big")
        else:
            at = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2")) + 5
            content[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        assert picture(bytes(content)).size() == (width, height)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_scaled_as_if_it_stood_upright(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    format = "TIFF" if mode == "CMYK" else "PNG"
    turned, upright = (picture(stored(mode, format, {"exif": e}, 100, 60)) for e in (exif, Image.Exif()))
    whole = turned.pixels()
    assert (whole.tobytes() == upright.pixels().tobytes()) == (orientation == 1)
    expected = crop(cover(whole, (20, 30)), (20, 30), 0.2, 0.9)
    found = turned.pixels((20, 30), 0.2, 0.9)
    assert found.size == (30, 20)
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 4  # rounded in another order


def test_a_jpeg_of_several_scans_is_told_by_its_first():
    whole, progressive = (stored(*STORED[kind], 100) for kind in ("photograph", "progressive"))
    alone = bytearray(whole)
    alone[alone.index(b"\xff\xda") + 4] = 1  # of three components
    filled = whole[:2] + b"\xff" + whole[2:]  # which may stand before a marker
    found = [_is_in_scans(io.BytesIO(c)) for c in (whole, progressive, bytes(alone), filled, whole[:30], b"")]
    assert found == [False, True, True, True, True, True]


def test_a_tile_that_is_larger_than_its_picture_is_refused():
    entries = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 20_000, 323: 20_000, 324: 200, 325: 8}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(100)
    with pytest.raises(DamagedImage, match=r"64x64 \(0 megapixels, TIFF L\) would take 572 MB of memory"):
        picture(content).size()


def test_what_may_be_held_grows_with_the_file(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_DECODED_BYTES", 1000)
    content = stored("RGB", "PNG", {"compress_level": 0}, 100)
    with pytest.raises(DamagedImage, match=r"100x100 .* would take 0 MB"):
        picture(content[:20_000]).size()
    assert picture(content).size() == (100, 100)


def of_image(image: Image.Image, format="PNG", **options) -> Picture:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return picture(stream.getvalue())


def test_a_turned_photograph_is_shown_upright(tmp_path):
    image = Image.new("RGB", (20, 12))
    image.paste("red", (0, 0, 20, 3))  # along the upper edge; orientation 6 turns it to the right edge
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = of_image(image, "PNG", exif=exif)
    assert turned.size() == turned.pixels().size == (12, 20)
    assert turned.pixels().getpixel((11, 10)) == (255, 0, 0) and turned.pixels().getpixel((0, 0)) == (0, 0, 0)


def test_transparency_is_white_and_every_mode_is_rgb():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert of_image(clear).pixels().getpixel((0, 0)) == (255, 255, 255)
    palette = clear.convert("P")
    palette.info["transparency"] = 0
    assert of_image(palette, transparency=0).pixels().getpixel((0, 0)) == (255, 255, 255)
    for mode in ("1", "L", "LA", "P", "CMYK", "I;16"):
        stored = of_image(Image.new(mode, (4, 4)), "TIFF" if mode == "CMYK" else "PNG")
        assert stored.pixels().mode == "RGB", mode


def test_a_transparent_picture_can_be_laid_on_another_colour():
    paint = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    paint.putpixel((0, 0), (255, 255, 255, 255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255] * 2)
    palette.putpixel((0, 0), 1)
    for stored in (of_image(paint), of_image(paint.convert("LA")), of_image(palette, transparency=0)):
        shown = stored.pixels(background="black")
        assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (0,) * 3]


def deep(levels, dtype, format="TIFF", **options) -> Picture:
    return of_image(Image.fromarray(np.array([levels], dtype=dtype)), format, **options)


@pytest.mark.parametrize(
    ("levels", "dtype", "format"),
    [
        ([0, 257, 1000, 32768, 65535], "<u2", "PNG"),
        ([0, 257, 1000, 32768, 65535], "<u2", "TIFF"),
        ([0, 257, 1000, 32768, 65535], ">u2", "TIFF"),
        ([0, 257, 1000, 32768, 65535], "<i4", "TIFF"),  # as older versions of Pillow open 16 bits
        ([0, 1 / 255, 4 / 255, 128 / 255, 1], "<f4", "TIFF"),
    ],
)
def test_deep_grey_is_as_bright_as_it_says(levels, dtype, format):
    for shown in (levels, levels[:3]):  # whatever its own maximum is
        pixels = deep(shown, dtype, format).pixels()
        assert [pixels.getpixel((x, 0))[0] for x in range(len(shown))] == [0, 1, 4, 128, 255][: len(shown)]


def test_deep_grey_may_name_a_level_that_is_transparent():
    levels = [0, 4660, 4661, 65535]
    shown = deep(levels, "<u2", "PNG", transparency=4660)
    assert [shown.pixels().getpixel((x, 0))[0] for x in range(4)] == [0, 255, 18, 255]
    assert [shown.pixels(background="black").getpixel((x, 0))[0] for x in range(4)] == [0, 0, 18, 255]


def test_twelve_bits_are_scaled_by_their_own_white():
    entries = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1, 279: 3}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory
    pixels = picture(content.ljust(200, b"\0") + b"\xff\xf8\x00").pixels()
    assert [pixels.getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]


@pytest.mark.parametrize(
    ("levels", "dtype", "said"),
    [
        ([0, 70000], "<i4", r"its values are from 0 to 70000, those of 16 bits from 0 to 65535; convert it to 8 bits"),
        ([-1, 7], "<i4", "from -1 to 7"),
        ([-0.5, 1], "<f4", r"its values are from -0.5 to 1, those of float from 0 to 1; convert"),
        ([0.5, 255], "<f4", "from 0.5 to 255"),
        ([0.5, float("nan"), 0.7], "<f4", "from nan to nan"),
    ],
)
def test_deep_grey_without_a_known_white_is_refused(levels, dtype, said):
    with pytest.raises(DamagedImage, match=said):
        deep(levels, dtype).pixels()


def test_damage_is_named_whatever_it_is():
    for content in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(50)):
        with pytest.raises(DamagedImage, match="cannot be read"):
            Picture("x", "y", partial(io.BytesIO, content)).size()

    def gone():
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(DamagedImage, match="No such file"):
        Picture("x", "y", gone).pixels()


def test_a_deep_tiff_whose_zero_is_white_is_no_negative(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 0
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 2**16 - 1]], dtype=np.uint16)).save(path, tiffinfo=tags)
    with Image.open(path) as stored:
        assert stored.tag_v2[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] == 0
    assert [pixel[0] for pixel in read_picture(path).getdata()] == [255, 0]
