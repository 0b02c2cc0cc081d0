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
