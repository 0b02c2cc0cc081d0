"""`image/folder`: what is skipped and said, and what a batch holds."""

import os
from pathlib import Path

import pytest
import torch
from picture_folders import CENTRE, load, truncate, write_pictures
from PIL import Image

from xdiffusion.build import build_data, image_shape, load_config
from xdiffusion.config_files import ConfigError
from xdiffusion.data.image_folder import load_image_folder

# --- what is skipped ---


def test_unusable_pictures_are_counted_and_named(tmp_path):
    write_pictures(tmp_path, [(16, 16), (1, 1), (16, 16), (2, 16)], ["words"])
    (tmp_path / "noise.jpg").write_bytes(b"no picture at all")
    (tmp_path / "noise.txt").write_text("words")
    (tmp_path / "empty.webp").touch()
    (tmp_path / "picture_2.txt").write_text(" \n")
    images = load(tmp_path)
    assert [p.name for p in images.pictures] == ["picture_0.png"]
    assert images.skipped["picture_1.png"] == "1x1 would be enlarged more than 4 times to cover 16x16"
    assert images.skipped["picture_2.png"] == images.skipped["empty.webp"] == "no caption"
    assert "cannot be read" in images.skipped["noise.jpg"]
    assert "skipped 5: " in images.summary and "picture_1.png (1x1" in images.summary


def test_a_summary_names_the_first_skips_and_counts_the_rest(tmp_path):
    write_pictures(tmp_path, [(16, 16)] + [(1, 1)] * 8, ["words"])
    assert load(tmp_path).summary.count(" (1x1") == 5 and load(tmp_path).summary.endswith("and 3 more")


def test_a_picture_above_the_limit_is_skipped_by_its_header_alone(tmp_path, monkeypatch):
    write_pictures(tmp_path, [(16, 16)], ["words"])
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "huge.txt").write_text("words")
    decode = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: image.width < 10_000 and decode(image))
    assert load(tmp_path).skipped == {
        "huge.png": "10000x10000 (100 megapixels, PNG 1) would take 572 MB of memory; allowed are 256"
    }


def test_pillow_s_own_limit_is_a_skip_too(tmp_path, monkeypatch):
    write_pictures(tmp_path, [(16, 16), (64, 64)], ["words"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert load(tmp_path).skipped == {"picture_1.png": "it has more than 0 megapixels"}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file_is_skipped_and_named(make, tmp_path):
    """Whoever opened a pipe would wait for ever, and a device has no end."""
    write_pictures(tmp_path, [(16, 16)])
    make(tmp_path / "pipe.png")
    assert load(tmp_path).skipped == {"pipe.png": "is no file"}


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no picture; the endings looked for are \.png"):
        load(tmp_path)
    write_pictures(tmp_path, [(1, 1)], ["words"])
    with pytest.raises(ValueError, match=r"no usable picture: .*skipped 1: picture_0.png \(1x1"):
        load(tmp_path)
    with pytest.raises(ValueError, match="--data_dir FOLDER"):
        load_image_folder(16)


def test_a_truncated_picture_is_replaced_by_the_next_of_its_bucket_and_named_once(tmp_path, capsys):
    paths = write_pictures(tmp_path, [(16, 16), (20, 12), (16, 16)], ["a", "b", "c"])
    truncate(paths[2])
    images = load(tmp_path)
    assert len(images) == 3  # its header is whole
    for _ in range(2):
        batch = images.batch(torch.tensor([2]), torch.zeros(1), CENTRE)
        assert batch.captions == ["a"] and batch.labels.tolist() == [0]
    err = capsys.readouterr().err
    assert err.count("picture_2.png is replaced by picture_0.png: cannot be read") == 1 and "1 damaged so far" in err


@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()], ids=["truncated", "removed"])
def test_a_bucket_that_is_damaged_later_is_replaced_from_another_in_its_own_shape(tmp_path, damage, capsys):
    paths = write_pictures(tmp_path, [(16, 16), (20, 12), (16, 16)], ["a", "b", "c"])
    images = load(tmp_path)
    damage(paths[1])
    batch = images.batch(torch.tensor([1]), torch.zeros(1), CENTRE)
    assert batch.captions == ["a"] and batch.images.shape[2:] == images.sizes[1]
    assert capsys.readouterr().err.count("picture_1.png is replaced by picture_0.png") == 1
    for path in paths:
        truncate(path) if path.exists() else None
    with pytest.raises(ValueError, match=r"none of its 3 pictures is whole any more: picture_1.png cannot be read"):
        images.batch(torch.tensor([1]), torch.zeros(1), CENTRE)
    assert capsys.readouterr().err == ""


def test_a_bucket_without_a_whole_picture_is_left_out(tmp_path):
    paths = write_pictures(tmp_path, [(20, 12), (16, 16), (20, 12)], ["a", "b", "c"])
    truncate(paths[0]), truncate(paths[2])
    images = load(tmp_path)
    assert list(images.buckets) == [(16, 16)] and images.captions == [("b",)]
    assert images.skipped.keys() == {"picture_0.png", "picture_2.png"} and "skipped 2: picture_0.png (cannot" in images.summary
    truncate(paths[1])
    with pytest.raises(ValueError, match=r"no usable picture: .*skipped 3: picture_0.png \(cannot be read"):
        load(tmp_path)


# --- batches ---


def test_a_batch_is_cropped_flipped_and_scaled(tmp_path):
    write_pictures(tmp_path, [(24, 12)], ["words"])
    index, wording = torch.zeros(1, dtype=torch.long), torch.zeros(1)
    plain = load(tmp_path).batch(index, wording, torch.zeros(3, 1)).images
    assert plain.shape == (1, 3, 12, 20) and plain.min() >= -1 and plain.max() <= 1
    flipped = load(tmp_path, flip=True)
    assert torch.equal(flipped.batch(index, wording, torch.tensor([[0.4], [0], [0]])).images, plain.flip(3))
    assert torch.equal(flipped.batch(index, wording, torch.tensor([[0.6], [0], [0]])).images, plain)
    moved = load(tmp_path, random_crop=True)
    left, right = (moved.batch(index, wording, torch.tensor([[0.9], [0.5], [x]])).images for x in (0.0, 0.999))
    assert not torch.equal(left, right) and torch.equal(left[..., 4:], right[..., :-4])


def test_every_picture_is_in_the_bucket_of_its_shape(tmp_path):
    write_pictures(tmp_path, [(16, 16), (30, 15), (16, 32), (17, 16)], ["words"])
    images = load(tmp_path)
    assert {size: index.tolist() for size, index in images.buckets.items()} == {
        (12, 20): [1], (16, 16): [0, 3], (20, 12): [2],
    }  # fmt: skip


def test_the_config_names_a_folder(tmp_path):
    write_pictures(tmp_path / "set", [(16, 16)], ["words"])
    path = tmp_path / "config.yaml"
    path.write_text("data: {kind: image/folder, image_size: 16, bucket_multiple: 4, flip: true}\ndiffusion: {prediction: eps}")
    config = load_config(path, [f"data.data_dir={tmp_path / 'set'}"])
    assert image_shape(config) == (3, 16, 16) and build_data(config).flip
    with pytest.raises(ConfigError, match=r"data: image/folder needs .*--data_dir FOLDER"):
        build_data(load_config(path))
    with pytest.raises(ConfigError, match=r"image/folder_inverted' is unknown.*image/cifar10 also with _inverted"):
        build_data(load_config(path, [f"data.data_dir={tmp_path / 'set'}", "data.kind=image/folder_inverted"]))
