"""`image/hugging_face` on a stand-in for the library `datasets`, which is optional."""

import io
import sys
from types import ModuleType

import pytest
import torch
from picture_folders import write_pictures
from PIL import Image

from xdiffusion.data.hugging_face import load_hugging_face

SMALL = {"image_size": 16, "bucket_multiple": 4}


def stored(size):
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


class Rows:
    """As much of datasets.Dataset as is used."""

    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)
        self.features = {"image": "Image", "text": "string", "number": "int64"}

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}

    def select_columns(self, names):
        return Rows({name: self.columns[name] for name in names})

    def cast_column(self, name, feature):
        assert feature == "undecoded image" and list(self.columns) == [name]  # no other is decoded with it
        if self.features.get(name) == "int64":
            raise NotImplementedError("Unsupported cast from int64 to struct")
        return self


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The module, with one data set whose third row is broken, fourth is empty and fifth has no caption."""
    on_disk = {"bytes": None, "path": str(write_pictures(tmp_path / "files", [(16, 16)])[0])}
    pictures = [stored((16, 16)), on_disk, {"bytes": b"broken", "path": None}, None, stored((16, 16))]
    texts = ["one", ["two", "more"], "three", "four", None]
    library = ModuleType("datasets")
    library.Image = lambda decode: "undecoded image" if not decode else None

    def load_dataset(name, split):
        if (name, split) != ("someone/pictures", "train"):
            raise FileNotFoundError(f"no {name}\n {split}")
        return Rows({"image": pictures, "text": texts, "number": [1] * 5})

    library.load_dataset = load_dataset
    library.load_from_disk = lambda path: {"test": Rows({"photo": pictures[:1], "words": ["saved"]})}
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def test_rows_are_captioned_pictures(datasets, capsys):
    images = load_hugging_face(dataset_name="someone/pictures", **SMALL)
    assert images.captions == [("one",), ("two",)]
    assert set(images.skipped) == {"row 2", "row 3", "row 4"} and images.skipped["row 3"] == "the cell is empty"
    assert "captions from column 'text'; skipped 3" in capsys.readouterr().out
    batch = images.batch(torch.tensor([0, 1]), torch.zeros(2), torch.zeros(3, 2))
    assert batch.images.shape == (2, 3, 16, 16) and batch.images[0, 0].min() == 1


@pytest.mark.parametrize("path", ["/dev/zero", "/", "a" * 5000, "a\0b", "nowhere"])
def test_a_row_whose_path_is_no_file_is_skipped(path, datasets, monkeypatch):
    rows = Rows({"image": [stored((16, 16)), {"bytes": None, "path": path}], "text": ["one", "two"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    images = load_hugging_face(dataset_name="someone/pictures", **SMALL)
    assert images.captions == [("one",)] and list(images.skipped) == ["row 1"]


def test_a_saved_data_set_and_other_columns(datasets):
    columns = {"split": "test", "image_column": "photo", "caption_column": "words"}
    assert load_hugging_face(data_dir="somewhere", **columns, **SMALL).captions == [("saved",)]
    with pytest.raises(ValueError, match=r"needs data\.dataset_name, a set of the hub, or --data_dir"):
        load_hugging_face(**columns, **SMALL)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"caption_column": "caption"}, "no column 'caption'; its columns are image, text"),
        ({"image_column": "number"}, "column 'number' holds no pictures but int64"),
        ({"image_column": "img"}, "no column 'img'"),
        ({"split": "valid"}, "someone/pictures, split valid: no someone/pictures valid"),
        ({"data_dir": "somewhere", "split": "train"}, "somewhere, split train: 'train'"),
    ],
)
def test_what_is_not_there_is_named(datasets, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_hugging_face(dataset_name="someone/pictures", **SMALL, **given)


def test_without_the_library_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install datasets, .*image/folder"):
        load_hugging_face(dataset_name="someone/pictures", **SMALL)
