"""What people's folders hold: captions of other programs, pictures of phones, links."""

import pytest
from picture_folders import write_pictures
from test_image_folder import captions, load

# --- captions ---


def test_a_caption_that_its_own_commas_would_cut_is_an_error(tmp_path):
    write_pictures(tmp_path, [(16, 16)] * 2)
    lines = ["file_name,text", 'picture_0.png,"a fox,', 'red",,', "picture_1.png,a cat, black"]
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


@pytest.mark.parametrize(
    "content", ["un café".encode("latin-1"), "a cat".encode("utf-16-le"), "狐".encode("utf-16")[:3]]
)
def test_a_caption_that_is_no_utf_8_is_skipped_and_named(tmp_path, content):
    write_pictures(tmp_path, [(16, 16)] * 2, ["words"])
    (tmp_path / "picture_1.txt").write_bytes(content)
    images = load(tmp_path)
    assert captions(images) == {"picture_0.png": "words"}
    assert images.skipped == {"picture_1.png": "caption is not UTF-8"}
    assert len(load(tmp_path, captions=["of the config"])) == 2
