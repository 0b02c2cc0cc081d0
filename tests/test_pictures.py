"""Pictures hold the pixels of their images, captions that fit, readable metadata, and films all their frames."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from xdiffusion.pictures import (
    MARGIN,
    PAPER,
    SHORT_SIDE,
    _fit,
    _lines,
    grid,
    labelled_rows,
    save_gif,
    save_png,
    strength_label,
)

SIDE = 72  # of a tile: 8 pixels, 9 times


def random_images(count: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    """Images whose values are those of 8-bit pixels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator) / 127.5 - 1


def pixels(page: Image.Image, x: int, y: int, side: int = SIDE) -> np.ndarray:
    return np.asarray(page.crop((x, y, x + side, y + side)))


def enlarged(image: torch.Tensor, factor: int) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> (factor H, factor W, 3) bytes."""
    levels = ((image + 1) * 127.5).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return levels.repeat(factor, axis=0).repeat(factor, axis=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_pixel_for_pixel(channels):
    images = random_images(5, channels)
    page = grid(images, columns=3)
    assert page.mode == "RGB"
    assert page.size == (MARGIN + 3 * (SIDE + MARGIN), MARGIN + 2 * (SIDE + MARGIN))
    for i, image in enumerate(images):
        x, y = (MARGIN + k * (SIDE + MARGIN) for k in (i % 3, i // 3))
        assert np.array_equal(pixels(page, x, y), enlarged(image, 9))
    assert set(page.crop((MARGIN + 2 * (SIDE + MARGIN), MARGIN + SIDE + MARGIN, *page.size)).getdata()) == {PAPER}


def test_values_outside_the_range_are_clamped():
    page = grid(torch.tensor([-5.0, 5.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8), columns=2)
    assert pixels(page, MARGIN, MARGIN).max() == 0
    assert pixels(page, 2 * MARGIN + SIDE, MARGIN).min() == 255


@pytest.mark.parametrize(("size", "side"), [(8, 72), (24, 72), (32, 96), (28, 84), (72, 72), (100, 100)])
def test_images_are_enlarged_by_a_whole_factor(size, side):
    assert grid(random_images(1, size=size), columns=1).size == (side + 2 * MARGIN, side + 2 * MARGIN)
    assert SHORT_SIDE == 72


def test_captions_and_titles_add_room_and_ink_and_leave_the_images():
    images = random_images(4)
    bare = grid(images, columns=2)
    page = grid(images, ["0", "1", "2", "3"], columns=2, title="step 5")
    assert page.width == bare.width
    line, head = 15, 20
    assert page.height == bare.height + head + 2 * line
    for row in range(2):
        y = head + MARGIN + row * (SIDE + line + MARGIN)
        assert np.array_equal(pixels(page, MARGIN, y), enlarged(images[2 * row], 9))
        below = np.asarray(page.crop((MARGIN, y + SIDE, MARGIN + SIDE, y + SIDE + line)))
        assert below.min() < 100
    assert np.asarray(page.crop((0, 0, page.width, head))).min() < 100


def test_long_captions_are_shortened_to_their_tile():
    font = ImageFont.load_default(10)
    assert _fit("zero", SIDE, font) == "zero"
    short = _fit("a handwritten zero with a long tail", SIDE, font)
    assert short.startswith("a hand")
    assert short.endswith("…")
    assert SIDE - 12 < font.getlength(short) <= SIDE
    images = torch.full((1, 1, 8, 8), -1.0)
    page = grid(images, ["a very long caption " * 5], columns=1)
    outside = [page.crop((0, 0, MARGIN, page.height)), page.crop((MARGIN + SIDE + 1, 0, *page.size))]
    assert all(set(strip.getdata()) == {PAPER} for strip in outside)


def test_a_caption_wider_than_its_tile_goes_on_in_more_lines():
    font = ImageFont.load_default(10)
    assert _lines("zero", SIDE, font) == ["zero"]
    assert _lines("", SIDE, font) == [""]
    assert _lines("an image of\nthree", SIDE, font) == ["an image of", "three"]
    *lines, last = _lines("an image of three and of some more digits", SIDE, font)
    assert lines == ["an image of", "three and of"]
    assert last.startswith("some more") and last.endswith("…")
    images = random_images(4)
    page = grid(images, ["0", "an image of three", "2", "3"], columns=2)
    assert page.height == grid(images, columns=2).height + 4 * 15  # every row has the room that the longest needs
    second = np.asarray(page.crop((2 * MARGIN + SIDE, MARGIN + SIDE + 15, 2 * (MARGIN + SIDE), MARGIN + SIDE + 30)))
    assert second.min() < 100
    assert np.array_equal(pixels(page, MARGIN, 2 * MARGIN + SIDE + 30), enlarged(images[2], 9))


def test_rows_are_labelled_and_hold_their_batches():
    batches = [random_images(6)[:3], random_images(6)[3:]]
    page = labelled_rows(batches, ["base", "LoRA x 0.5"], ["a", "b", "c"])
    single = grid(batches[0], columns=3)
    left = page.width - single.width
    assert left > ImageFont.load_default(13).getlength("LoRA x 0.5")
    assert page.height == 2 * single.height + 15  # captions below the last row only
    for row, batch in enumerate(batches):
        for column, image in enumerate(batch):
            x, y = left + MARGIN + column * (SIDE + MARGIN), row * single.height + MARGIN
            assert np.array_equal(pixels(page, x, y), enlarged(image, 9))
        assert np.asarray(page.crop((0, row * single.height, left, (row + 1) * single.height))).min() < 100


def test_a_png_carries_its_recipe(tmp_path):
    page = grid(random_images(2, channels=3), columns=2)
    path = tmp_path / "not/there/yet/picture.png"
    save_png(page, path, {"seed": "3", "prompts": json.dumps(["0", "zéro — 0"])})
    with Image.open(path) as read:
        assert read.text == {"seed": "3", "prompts": json.dumps(["0", "zéro — 0"])}
        assert np.array_equal(np.asarray(read), np.asarray(page))
    save_png(page, path)
    with Image.open(path) as read:
        assert read.text == {}


def test_a_film_has_every_frame_and_rests_on_the_first_and_the_last(tmp_path):
    levels = [-1.0, -0.4, 0.1, 0.7]
    pages = [grid(torch.full((1, 1, 8, 8), level), columns=1) for level in levels]
    save_gif(pages, tmp_path / "films/film.gif", milliseconds=100)
    with Image.open(tmp_path / "films/film.gif") as film:
        assert film.n_frames == len(levels)
        assert film.info["loop"] == 0
        for i, level in enumerate(levels):
            film.seek(i)
            assert film.info["duration"] == {0: 800, len(levels) - 1: 2000}.get(i, 100)
            centre = film.convert("RGB").getpixel((film.width // 2, film.height // 2))
            assert max(abs(c - (level + 1) * 127.5) for c in centre) < 4


@pytest.mark.parametrize(
    ("share", "scales", "expected"),
    [(0, [0.8], "base"), (0.5, [0.8], "LoRA x 0.4"), (1, [1, 1], "LoRA x 1"), (0.5, [0.8, -1], "LoRA x 0.4 + -0.5")],
)
def test_labels_say_the_strengths_that_the_loras_have(share, scales, expected):
    assert strength_label(share, scales) == expected
