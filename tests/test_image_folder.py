"""`image/folder`: which caption a picture gets, what is skipped and said, and what a batch holds."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT
from picture_folders import truncate, write_pictures
from PIL import Image

from xdiffusion.build import build_data, image_shape, load_config
from xdiffusion.config_files import ConfigError
from xdiffusion.data import image_folder as module
from xdiffusion.data.image_folder import load_image_folder

sys.path.append(str(ROOT / "bench"))
from measure import peak_resident

SMALL = {"image_size": 16, "bucket_multiple": 4}
CENTRE = torch.full((3, 1), 0.5)


def load(folder, **settings):
    return load_image_folder(data_dir=str(folder), **SMALL | settings)


def captions(images):
    return {p.name: c[0] for p, c in zip(images.pictures, images.captions)}


# --- captions ---


def test_captions_from_text_files_beside_the_pictures(tmp_path, capsys):
    write_pictures(tmp_path, [(16, 16), (24, 12)], ["a cat", "a\ndog "])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "picture_0.png", "text": "unused"}))
    images = load(tmp_path)
    assert captions(images) == {"picture_0.png": "a cat", "picture_1.png": "a dog"}
    assert capsys.readouterr().out.strip() == images.summary
    assert (
        "2 pictures in 2 shapes (20x12: 1, 16x16: 1)" in images.summary and "captions from .txt files" in images.summary
    )


@pytest.mark.parametrize("key", ["text", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_from_metadata(tmp_path, kind, key):
    write_pictures(tmp_path / "below", [(16, 16)] * 3)
    rows = [("below/picture_0.png", "one, two"), ("below/picture_2.png", "three"), ("below/gone.png", "four")]
    if kind == "jsonl":
        text = "\n".join(json.dumps({"file_name": n, key: t}) for n, t in rows) + "\n\n"
    else:
        text = f"file_name,{key}\n" + "".join(f'{n},"{t}"\n' for n, t in rows)
    (tmp_path / f"metadata.{kind}").write_text(text)
    images = load(tmp_path)
    assert captions(images) == {"below/picture_0.png": "one, two", "below/picture_2.png": "three"}
    assert set(images.skipped) == {"below/picture_1.png", "below/gone.png"}
    assert images.skipped["below/picture_1.png"] == "no caption"
    assert f"captions from metadata.{kind}" in images.summary


def test_metadata_of_the_folders_below_name_their_own_pictures(tmp_path):
    for name in ("a", "b/c"):
        write_pictures(tmp_path / name, [(16, 16)] * 2)
    (tmp_path / "metadata.csv").write_text("file_name,text\na/picture_0.png,outer\na/picture_1.png,outer\n")
    (tmp_path / "a/metadata.csv").write_text("file_name,text\npicture_0.png,unused\n")
    (tmp_path / "a/metadata.jsonl").write_text('{"file_name": "./picture_0.png", "text": "inner"}')
    (tmp_path / "b/metadata.csv").write_text("file_name,caption\nc/picture_0.png,below\n../a/picture_1.png,beside\n")
    os.mkfifo(tmp_path / "b/metadata.jsonl")  # a list is a file
    (tmp_path / "b/c/metadata.csv").mkdir()
    images = load(tmp_path)
    expected = {"a/picture_0.png": "inner", "a/picture_1.png": "beside", "b/c/picture_0.png": "below"}
    assert captions(images) == expected and set(images.skipped) == {"b/c/picture_1.png"}
    assert "captions from metadata.csv, a/metadata.jsonl, b/metadata.csv" in images.summary
    (tmp_path / "a/metadata.jsonl").write_text('{"file_name": "../../x.png", "text": "inner"}')
    with pytest.raises(ValueError, match=r"a/metadata.jsonl, line 1: file_name '../x.png' leads out of the folder"):
        load(tmp_path)


def test_an_empty_text_hides_no_caption(tmp_path):
    write_pictures(tmp_path / "a", [(16, 16)] * 3)
    (tmp_path / "metadata.csv").write_text("file_name,text,caption\na/picture_0.png,outer,\na/picture_1.png,,beside\n")
    rows = [
        '{"file_name": "picture_0.png", "text": ""}',
        '{"file_name": "picture_2.png", "text": null, "caption": "c"}',
    ]
    (tmp_path / "a/metadata.jsonl").write_text("\n".join(rows))
    expected = {"a/picture_0.png": "outer", "a/picture_1.png": "beside", "a/picture_2.png": "c"}
    assert captions(load(tmp_path)) == expected


def test_captions_from_file_names(tmp_path):
    for name in ("a_red_circle_003", "a cat (2)", "42", "sks-dog-1"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    assert set(captions(load(tmp_path)).values()) == {"a red circle", "a cat", "42", "sks-dog"}


def test_captions_of_the_config_are_drawn_in_place_of_the_pictures_own(tmp_path):
    write_pictures(tmp_path, [(16, 16)], ["own"])
    images = load(tmp_path, captions=["a", "b"])
    index = torch.zeros(2, dtype=torch.long)
    batch = images.batch(index, torch.tensor([0.1, 0.9]), CENTRE.expand(3, 2))
    assert batch.captions == ["a", "b"] and "captions from the config" in images.summary
    assert images.prompts.captions == (("a",), ("b",))


def test_a_caption_with_braces_is_no_template(tmp_path):
    write_pictures(tmp_path, [(16, 16)], ["a {set} of {}"])
    assert load(tmp_path).prompts.captions == (("a {set} of {}",),)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"file_name": "../secret.png", "text": "x"}', r"line 1: file_name '../secret.png' leads out of the folder"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "leads out of the folder"),
        ("{broken", "line 1 is no JSON"),
        ("[1]", "must be a JSON object"),
        ('{"text": "x"}', "must have the texts file_name and text"),
        ('{"file_name": "picture_0.png", "text": 3}', "must have the texts"),
        ('{"file_name": "%s.png"}' % ("a" * 5000), "line 1: file_name 'a{79} File name too long"),
        ('{"file_name": "a\\u0000.png"}', "line 1: file_name"),
    ],
)
def test_wrong_metadata_is_an_error_that_names_the_line(tmp_path, line, complaint):
    write_pictures(tmp_path / "set", [(16, 16)])
    write_pictures(tmp_path, [(16, 16)])[0].rename(tmp_path / "secret.png")
    (tmp_path / "set" / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path / "set")


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("jsonl", b"[" * 2 * 10**7, r"line 1: a row of more than 1,048,576 letters"),
        ("csv", b'file_name,text\n"' + b"\n" * 10**7, r"behind line \d+: field larger than field limit"),
        ("csv", b"file_name,text\n" + b"," * 10**7, "line 2: a row of more than 1,048,576 letters"),
    ],
)
def test_a_row_without_end_is_named_and_not_held(kind, content, reason, tmp_path):
    write_pictures(tmp_path, [(16, 16)])
    (tmp_path / f"metadata.{kind}").write_bytes(content)

    def read():
        with pytest.raises(ValueError, match=rf"metadata\.{kind}.* {reason}"):
            load(tmp_path)

    assert peak_resident(read) < 8 * 2**20


def test_a_list_of_pictures_that_are_not_there_is_counted_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ABSENT", 10)
    write_pictures(tmp_path, [(16, 16)])
    rows = [f"{i}.png,words" for i in range(40)] + ["picture_0.png,words"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    images = load(tmp_path)
    assert len(images) == 1 and len(images.skipped) == 10
    assert "skipped 40: 0.png (" in images.summary and images.summary.endswith("and 35 more")


@pytest.mark.parametrize("source", ["txt", "jsonl"])
def test_a_picture_with_a_caption_without_end_is_skipped(source, tmp_path):
    write_pictures(tmp_path, [(16, 16)] * 2, ["words"])
    (tmp_path / "picture_1.txt").write_text("w" * 10**6)
    if source == "jsonl":
        rows = [{"file_name": f"picture_{i}.png", "text": text} for i, text in enumerate(["words", "w" * 20_000])]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for path in tmp_path.glob("*.txt"):
            path.unlink()
    images = load(tmp_path)
    assert captions(images) == {"picture_0.png": "words"}
    assert images.skipped == {"picture_1.png": "its caption has more than 16,384 letters"}


def test_metadata_cannot_reach_out_through_a_link_that_is_not_followed(tmp_path):
    write_pictures(tmp_path / "set", [(16, 16)])
    write_pictures(tmp_path / "other", [(16, 16)])
    (tmp_path / "set" / ".link").symlink_to(tmp_path / "other")
    row = {"file_name": ".link/picture_0.png", "text": "x"}
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="leads out of the folder"):
        load(tmp_path / "set")


def test_a_csv_without_its_columns_is_an_error(tmp_path):
    write_pictures(tmp_path, [(16, 16)])
    (tmp_path / "metadata.csv").write_text("name,text\na,b\n")
    with pytest.raises(
        ValueError, match=r"must have the columns file_name and text \(or caption\), not \['name', 'text'\]"
    ):
        load(tmp_path)


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
    assert (
        images.skipped.keys() == {"picture_0.png", "picture_2.png"}
        and "skipped 2: picture_0.png (cannot" in images.summary
    )
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
    path.write_text(
        "data: {kind: image/folder, image_size: 16, bucket_multiple: 4, flip: true}\ndiffusion: {prediction: eps}"
    )
    config = load_config(path, [f"data.data_dir={tmp_path / 'set'}"])
    assert image_shape(config) == (3, 16, 16) and build_data(config).flip
    with pytest.raises(ConfigError, match=r"data: image/folder needs .*--data_dir FOLDER"):
        build_data(load_config(path))
    with pytest.raises(ConfigError, match=r"image/folder_inverted' is unknown.*image/cifar10 also with _inverted"):
        build_data(load_config(path, [f"data.data_dir={tmp_path / 'set'}", "data.kind=image/folder_inverted"]))
