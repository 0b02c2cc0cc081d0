"""What people's folders hold: captions of other programs, pictures of phones, links."""

import pytest
from picture_folders import captions, load, write_pictures
from PIL import Image

from xdiffusion.data.image_folder import picture_files

# --- captions ---


def test_a_caption_that_its_own_commas_would_cut_is_an_error(tmp_path):
    write_pictures(tmp_path, [(16, 16)] * 2)
    lines = ["file_name,text", 'picture_0.png,"a fox,', 'red",, ', "picture_1.png,a cat, black"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    said = (
        r"metadata.csv, line 4 has more values than the 2 columns, the last ' black': a caption with commas must be in "
        r'double quotes, as in picture.png,"a red fox, sitting"'
    )
    with pytest.raises(ValueError, match=said):
        load(tmp_path)
    lines[3] = "picture_1.png,a cat"
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    assert captions(load(tmp_path)) == {"picture_0.png": "a fox, red", "picture_1.png": "a cat"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the latter two with a byte order mark
def test_captions_of_every_marked_encoding_are_read(tmp_path, encoding):
    write_pictures(tmp_path, [(16, 16)])
    for mark in ("", "\ufeff" if encoding == "utf-16" else ""):
        content = f"{mark}ein Fuchs\n im Café 狐".encode("utf-16-be" if mark else encoding)
        (tmp_path / "picture_0.txt").write_bytes(content)
        assert captions(load(tmp_path)) == {"picture_0.png": "ein Fuchs im Café 狐"}


@pytest.mark.parametrize("content", ["un café".encode("latin-1"), "a cat".encode("utf-16-le"), "狐".encode("utf-16")[:3]])
def test_a_caption_that_is_no_utf_8_is_skipped_and_named(tmp_path, content):
    write_pictures(tmp_path, [(16, 16)] * 2, ["words"])
    (tmp_path / "picture_1.txt").write_bytes(content)
    images = load(tmp_path)
    assert captions(images) == {"picture_0.png": "words"}
    assert images.skipped == {"picture_1.png": "caption is not UTF-8"}
    assert len(load(tmp_path, captions=["of the config"])) == 2


# --- endings ---


def test_every_ending_of_a_jpeg_is_read(tmp_path):
    for name in ("a.jpg", "b.JPEG", "c.jfif", "d.jpe"):
        Image.new("RGB", (16, 16)).save(tmp_path / name, "JPEG")
    assert set(captions(load(tmp_path))) == {"a.jpg", "b.JPEG", "c.jfif", "d.jpe"}


@pytest.mark.parametrize("source", ["txt", "metadata", "names", "config"])
def test_pictures_of_formats_that_are_not_read_are_counted_and_named(tmp_path, source):
    names = ["a.HEIC", "b.heif", "c.avif", "d.jxl", "e.dng"]
    for name in names:
        (tmp_path / name).write_bytes(b"a picture of a phone")
    said = "this format is not read; convert to PNG or JPEG"
    with pytest.raises(ValueError, match=rf"no usable picture: .*skipped 5: a.HEIC \({said}\)"):
        load(tmp_path)
    write_pictures(tmp_path, [(16, 16)], ["words"] if source == "txt" else None)
    if source == "metadata":
        (tmp_path / "metadata.csv").write_text("file_name,text\npicture_0.png,words\na.HEIC,words\n")
    images = load(tmp_path, captions=["of the config"] if source == "config" else None)
    assert len(images) == 1 and images.skipped == dict.fromkeys(names, said)


# --- links ---


def test_links_to_folders_are_entered(tmp_path):
    write_pictures(tmp_path / "else/below", [(16, 16)] * 2)
    write_pictures(tmp_path / "set/own", [(16, 16)])
    (tmp_path / "set/linked").symlink_to(tmp_path / "else")
    rows = "file_name,text\nbelow/picture_0.png,words\nbelow/gone.png,words\n"
    (tmp_path / "else/metadata.csv").write_text(rows)
    images = load(tmp_path / "set")
    assert captions(images) == {"linked/below/picture_0.png": "words"}
    assert images.skipped == {
        "own/picture_0.png": "no caption",
        "linked/below/picture_1.png": "no caption",
        "linked/below/gone.png": "cannot be read (No such file or directory)",
    }


def test_no_folder_is_entered_twice(tmp_path):
    """Nor is one of the folder's own seen through a link, whichever name comes first."""
    write_pictures(tmp_path / "else", [(16, 16)])
    write_pictures(tmp_path / "set/own", [(16, 16)])
    links = {
        "a": "own",
        "b": "../else",
        "c": "../else",
        "own/loop": "..",
        "d": "..",
        ".hidden": "../else",
        "self": "self",
    }
    for name, target in links.items():
        (tmp_path / "set" / name).symlink_to(target)
    (tmp_path / "else/back").symlink_to(tmp_path / "set/own")
    found = [str(path.relative_to(tmp_path / "set")) for path in picture_files(tmp_path / "set")]
    assert found == ["b/picture_0.png", "own/picture_0.png"]


def test_a_link_to_itself_that_a_list_names_is_no_picture(tmp_path):
    write_pictures(tmp_path, [(16, 16)])
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "metadata.csv").write_text("file_name,text\npicture_0.png,words\nloop,words\nloop/a.png,words\n")
    reason = "cannot be read (Too many levels of symbolic links)"
    assert load(tmp_path).skipped == {"loop": reason, "loop/a.png": reason}


def test_the_order_is_that_of_the_names(tmp_path):
    for name in ("b", "a/c", "B", "a", "é"):
        write_pictures(tmp_path / name, [(16, 16)] * 2)
    assert picture_files(tmp_path) == sorted(tmp_path.rglob("*.png"))
