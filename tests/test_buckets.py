"""Aspect-ratio buckets: their shapes, which picture goes where, and the crop."""

import pytest
from PIL import Image

from xdiffusion.data.buckets import bucket_sizes, cover, crop, enlargement, nearest_bucket


@pytest.mark.parametrize(
    ("size", "multiple", "aspect"),
    [(512, 64, 2.0), (768, 64, 3.0), (32, 8, 2.0), (64, 64, 4.0), (1024, 64, 2), (64, 16, 3), (512, 8, 2)],
)
def test_sides_are_multiples_and_areas_about_equal(size, multiple, aspect):
    sizes = bucket_sizes(size, multiple, aspect)
    assert (size, size) in sizes and len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)  # as many tall as wide ones
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert max(height / width, width / height) <= aspect
        assert height * width <= size**2
        assert (height + multiple) * width > size**2 or (width + multiple) * height > size**2  # no smaller than needed


def test_the_shapes_at_512():
    assert bucket_sizes(512, 64, 2.0) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]


@pytest.mark.parametrize(("size", "multiple", "aspect"), [(1024, 64, 2), (64, 16, 3), (512, 8, 2), (512, 64, 2)])
def test_no_shape_that_is_allowed_has_more_of_a_picture(size, multiple, aspect):
    sides = range(multiple, 2 * size + 1, multiple)
    allowed = {
        (h, w) for h in sides for w in sides if h * w <= size**2 and max(h, w) <= aspect * min(h, w) + 1e-9
    }  # fmt: skip
    larger = {(h, w) for h, w in allowed if {(h + multiple, w), (h, w + multiple)} & allowed}
    assert set(bucket_sizes(size, multiple, aspect)) == allowed - larger


def test_no_aspect_but_the_square():
    assert bucket_sizes(512, 64, 1.0) == [(512, 512)]


@pytest.mark.parametrize(("size", "multiple", "aspect"), [(500, 64, 2.0), (512, 0, 2.0), (512, 64, 0.5), (0, 8, 2.0)])
def test_sizes_that_do_not_go_together_are_refused(size, multiple, aspect):
    with pytest.raises(ValueError, match=r"image_size=|max_aspect="):
        bucket_sizes(size, multiple, aspect)


def test_a_picture_goes_to_the_bucket_that_crops_it_least():
    sizes = bucket_sizes(512, 64, 2.0)
    # between the square and the next one: nearer to it by their difference, not by their quotient
    between = [(1138, 1000), (1000, 1138)]
    for width, height in [(100, 100), (640, 480), (480, 640), (1920, 1080), (3000, 100), (513, 512), *between]:
        chosen = nearest_bucket(width, height, sizes)

        def kept(size, width=width, height=height):
            scale = enlargement(width, height, size)
            return size[0] * size[1] / (width * height * scale**2)

        assert kept(chosen) == pytest.approx(max(map(kept, sizes)))


def fill(image, size, top=0.5, left=0.5):
    return crop(cover(image, size), size, top, left)


def test_filling_keeps_the_aspect_and_crops_where_it_is_told():
    image = Image.new("RGB", (40, 10), "black")
    image.paste("white", (0, 0, 10, 10))  # the left quarter
    left = fill(image, (10, 10), left=0.0)
    assert left.size == (10, 10) and left.getextrema() == ((255, 255),) * 3
    assert fill(image, (10, 10), left=1.0).getextrema() == ((0, 0),) * 3
    assert fill(image, (10, 20), left=0.0).getpixel((9, 5)) == (255, 255, 255)
    assert fill(image, (20, 40)).size == (40, 20)


def test_a_picture_of_the_bucket_s_size_is_untouched():
    image = Image.effect_noise((16, 24), 50).convert("RGB")
    assert fill(image, (24, 16), 0.3, 0.9).tobytes() == image.tobytes()
