"""`image/hugging_face` with the library `datasets`: sets in memory, in folders, and on a hub that is not there."""

import io
import sys
import urllib.request

import datasets
import pytest
import torch
from huggingface_hub import constants
from picture_folders import write_pictures
from PIL import Image

from xdiffusion.data.hugging_face import load_hugging_face

SMALL = {"image_size": 16, "bucket_multiple": 4}
FEATURES = {"image": datasets.Image(), "text": datasets.Value("string"), "number": datasets.Value("int64")}


def stored(size):
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def rows_of(columns, **features):
    return datasets.Dataset.from_dict(columns, features=datasets.Features({n: (FEATURES | features)[n] for n in columns}))


@pytest.fixture
def hub(monkeypatch):
    """What `load_dataset` finds there, by name; of each the split train."""
    found = {}

    def load_dataset(name, split):
        if name not in found or split != "train":
            raise FileNotFoundError(f"no {name}\n {split}")
        return found[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return found


@pytest.fixture
def pictures(hub, tmp_path):
    """A set whose third row is broken, fourth is empty and fifth has no caption; on the hub it is someone/pictures."""
    on_disk = {"bytes": None, "path": str(write_pictures(tmp_path / "files", [(16, 16)])[0])}
    images = [stored((16, 16)), on_disk, {"bytes": b"broken", "path": None}, None, stored((16, 16))]
    texts = [["one"], ["two", "more"], ["three"], ["four"], None]
    hub["someone/pictures"] = rows_of(
        {"image": images, "text": texts, "number": [1] * 5}, text=datasets.Sequence(datasets.Value("string"))
    )
    return hub["someone/pictures"]


def test_rows_are_captioned_pictures(pictures, capsys):
    images = load_hugging_face(dataset_name="someone/pictures", **SMALL)
    assert images.captions == [("one",), ("two",)]
    assert set(images.skipped) == {"row 2", "row 3", "row 4"} and images.skipped["row 3"] == "the cell is empty"
    assert "captions from column 'text'; skipped 3" in capsys.readouterr().out
    batch = images.batch(torch.tensor([0, 1]), torch.zeros(2), torch.zeros(3, 2))
    assert batch.images.shape == (2, 3, 16, 16) and batch.images[0, 0].min() == 1


@pytest.mark.parametrize("path", ["/dev/zero", "/", "a" * 5000, "a\0b", "nowhere"])
def test_a_row_whose_path_is_no_file_is_skipped(path, hub):
    hub["someone/pictures"] = rows_of({"image": [stored((16, 16)), {"bytes": None, "path": path}], "text": ["one", "two"]})
    images = load_hugging_face(dataset_name="someone/pictures", **SMALL)
    assert images.captions == [("one",)] and list(images.skipped) == ["row 1"]


def test_sets_in_folders_and_other_columns(tmp_path):
    rows = rows_of({"image": [stored((16, 16)), stored((32, 16))], "text": ["one", "two"]})
    other = rows.rename_columns({"image": "photo", "text": "words"})
    datasets.DatasetDict({"train": rows, "test": other.select([1])}).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files/train.parquet")
    columns = {"split": "test", "image_column": "photo", "caption_column": "words"}
    assert load_hugging_face(data_dir=str(tmp_path / "splits"), **columns, **SMALL).captions == [("two",)]
    for place in ({"data_dir": str(tmp_path / "one")}, {"dataset_name": str(tmp_path / "files")}):
        images = load_hugging_face(**place, **SMALL)
        assert images.captions == [("one",), ("two",)]
        assert images.batch(torch.tensor([0]), torch.zeros(1), torch.zeros(3, 1)).images[0, 0].min() == 1
    with pytest.raises(ValueError, match=r"splits, split valid: 'valid'$"):
        load_hugging_face(data_dir=str(tmp_path / "splits"), split="valid", **SMALL)
    with pytest.raises(ValueError, match=r"needs data\.dataset_name, a set of the hub, or --data_dir"):
        load_hugging_face(**columns, **SMALL)


def test_without_a_network_it_ends_at_once_and_says_what_to_do(monkeypatch):
    """The library itself tries five times more, for half a minute."""
    asked, told = [], []
    load = datasets.load_dataset

    def load_dataset(*given, **named):
        told.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return load(*given, **named)

    def no_route(request, timeout):
        asked.append(timeout)
        raise OSError("no route to host")

    for place in (constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", no_route)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"someone/pictures, split train: .*; without a network: save .* image/folder"):
        load_hugging_face(dataset_name="someone/pictures", **SMALL)
    assert asked and max(asked) <= 10
    assert told == [(True, True)]
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"caption_column": "caption"}, "no column 'caption'; its columns are image, text"),
        ({"image_column": "number"}, r"column 'number' holds no pictures but Value\(.*int64"),
        ({"image_column": "img"}, "no column 'img'"),
        ({"split": "valid"}, "someone/pictures, split valid: no someone/pictures valid"),
        ({"data_dir": "somewhere"}, "somewhere, split train: .*somewhere"),
    ],
)
def test_what_is_not_there_is_named(pictures, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_hugging_face(dataset_name="someone/pictures", **SMALL, **given)


def test_without_the_library_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install datasets, .*image/folder"):
        load_hugging_face(dataset_name="someone/pictures", **SMALL)
