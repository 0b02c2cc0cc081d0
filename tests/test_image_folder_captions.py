"""`image/folder`: which caption a picture gets."""

import json
import os
import sys
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from commands import ROOT
from picture_folders import CENTRE, captions, load, write_pictures
from PIL import Image

from xdiffusion.data import image_folder as module

sys.path.append(str(ROOT / "bench"))
from measure import peak_resident


def test_captions_from_text_files_beside_the_pictures(tmp_path, capsys):
    write_pictures(tmp_path, [(16, 16), (24, 12)], ["a cat", "a\ndog "])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "picture_0.png", "text": "unused"}))
    images = load(tmp_path)
    assert captions(images) == {"picture_0.png": "a cat", "picture_1.png": "a dog"}
    assert capsys.readouterr().out.strip() == images.summary
    assert (
        "2 pictures in 2 shapes (20x12: 1, 16x16: 1)" in images.summary
        and "captions from .txt files (metadata.jsonl is not used)" in images.summary
    )
    (tmp_path / "picture_1.png").unlink()
    assert ": 1 picture in 1 shape (16x16: 1), captions" in load(tmp_path).summary


def test_captions_in_files_with_the_ending_that_kohya_takes(tmp_path):
    write_pictures(tmp_path, [(16, 16)] * 3, ["a cat", "a dog", "a fox"])
    (tmp_path / "picture_0.txt").rename(tmp_path / "picture_0.caption")
    (tmp_path / "picture_1.caption").write_text("of two, the other")
    images = load(tmp_path)
    assert captions(images) == {"picture_0.png": "a cat", "picture_1.png": "a dog", "picture_2.png": "a fox"}
    assert "captions from .txt and .caption files" in images.summary
    for k in (1, 2):
        (tmp_path / f"picture_{k}.txt").unlink()
    images = load(tmp_path)
    assert captions(images) == {"picture_0.png": "a cat", "picture_1.png": "of two, the other"}
    assert images.skipped == {"picture_2.png": "no caption"} and "captions from .caption files" in images.summary


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


def test_a_picture_that_is_named_again_is_said(tmp_path, capsys):
    write_pictures(tmp_path, [(16, 16)] * 2)
    rows = [("picture_0.png", "one"), ("picture_1.png", "two"), ("picture_0.png", "three"), ("picture_0.png", "four")]
    text = "\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows)
    (tmp_path / "metadata.jsonl").write_text(text)
    assert captions(load(tmp_path)) == {"picture_0.png": "four", "picture_1.png": "two"}
    assert "metadata.jsonl: 2 rows name a picture again; the last one's caption counts" in capsys.readouterr().err


def test_accents_are_spelt_as_letters_or_beside_them(tmp_path):
    (path,) = write_pictures(tmp_path, [(16, 16)])
    path.rename(tmp_path / normalize("NFD", "café.png"))
    row = json.dumps({"file_name": normalize("NFC", "café.png"), "text": "coffee"})
    (tmp_path / "metadata.jsonl").write_text(row)
    images = load(tmp_path)
    assert [*captions(images).values()] == ["coffee"] and not images.skipped


def test_a_sidecar_may_end_in_capitals(tmp_path):
    write_pictures(tmp_path, [(16, 16)], ["a cat"])
    (tmp_path / "picture_0.txt").rename(tmp_path / "picture_0.TXT")
    assert captions(load(tmp_path)) == {"picture_0.png": "a cat"}


def test_what_cannot_be_written_as_text_is_no_caption(tmp_path):
    (path,) = write_pictures(tmp_path, [(16, 16)])
    path.rename(tmp_path / "a cat.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "a cat.png").read_bytes())
    images = load(tmp_path)
    assert captions(images) == {"a cat.png": "a cat"}
    assert [*images.skipped.values()] == ["its caption is no Unicode text, as names in another encoding are"]


@pytest.mark.parametrize("name", ["picture_0.txt", "metadata.jsonl"])
def test_a_caption_that_cannot_be_read_is_named(name, tmp_path, monkeypatch):
    write_pictures(tmp_path, [(16, 16)] * 2, ["one", "two"] if name.endswith(".txt") else [])
    (tmp_path / name).write_text("one")
    opened = Path.open

    def denied(path, *args, **keywords):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **keywords)

    monkeypatch.setattr(Path, "open", denied)
    if name.endswith(".txt"):
        assert load(tmp_path).skipped == {"picture_0.png": "caption cannot be read: Permission denied"}
    else:
        with pytest.raises(ValueError, match=r"metadata\.jsonl cannot be read: Permission denied"):
            load(tmp_path)


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
    with pytest.raises(ValueError, match=r"must have the columns file_name and text \(or caption\), not \['name', 'text'\]"):
        load(tmp_path)
