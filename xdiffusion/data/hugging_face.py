"""`image/hugging_face`: captioned pictures of a data set of the Hugging Face hub, or of a folder saved by `datasets`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.data.image_files import DamagedImage, Picture, open_file
from xdiffusion.downloads import hub_downloads


def load_hugging_face(
    image_size: int,
    dataset_name: str | None = None,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    data_dir: str | None = None,
    bucket_multiple: int = 64,
    max_aspect: float = 2.0,
    random_crop: bool = False,
    flip: bool = False,
    captions: Sequence[str] | None = None,
) -> CaptionedImages:
    """The pictures of one split, and one printed line about them. Needs `pip install datasets`.

    Args:
        dataset_name: on the hub, such as "lambdalabs/naruto-blip-captions", or a folder that `datasets.load_dataset` reads;
            not needed with data_dir.
        split, image_column, caption_column: which part of it; a column of lists of captions gives the first of each.
        data_dir: a folder written by `Dataset.save_to_disk`, read instead.
        image_size, bucket_multiple, max_aspect, random_crop, flip, captions: see `CaptionedImages`.

    Raises:
        ValueError: if `datasets` is missing, or the data set, its split or its columns are, or a column is of another kind;
            within seconds, if there is no network to the hub.
    """
    if dataset_name is None and data_dir is None:
        raise ValueError("image/hugging_face needs data.dataset_name, a set of the hub, or --data_dir, a folder that is saved")
    rows = _rows(dataset_name, split, data_dir)
    wanted = [image_column] if captions else [image_column, caption_column]
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(
            f"{data_dir or dataset_name} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}"
        )
    images = CaptionedImages(
        f"image/hugging_face {data_dir or dataset_name}",
        _pictures(rows, image_column, None if captions else caption_column),
        f"column {caption_column!r}",
        image_size=image_size,
        bucket_multiple=bucket_multiple,
        max_aspect=max_aspect,
        random_crop=random_crop,
        flip=flip,
        captions=captions,
    )
    print(images.summary)
    return images


def _rows(dataset_name: str | None, split: str, data_dir: str | None) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            "image/hugging_face needs the library datasets: pip install datasets, or save the pictures in a folder "
            "and use --dataset_name image/folder"
        ) from error
    on_hub = data_dir is None and not Path(dataset_name).exists()
    instead = "; without a network: save the pictures in a folder and use --dataset_name image/folder" if on_hub else ""
    try:
        with hub_downloads(datasets.config) if on_hub else nullcontext():
            if data_dir is None:
                return datasets.load_dataset(dataset_name, split=split)
            saved = datasets.load_from_disk(data_dir)
            return saved[split] if isinstance(saved, dict) else saved
    except Exception as error:  # the hub's own errors, a split that is not there, no network: all end here
        reason = shorten(str(error), 200, placeholder="...")
        raise ValueError(f"image/hugging_face {data_dir or dataset_name}, split {split}: {reason}{instead}") from error


def _pictures(rows: Any, image_column: str, caption_column: str | None) -> list[Picture]:
    import datasets

    alone = rows.select_columns([image_column])  # a row's other columns would be decoded with it
    try:
        stored = alone.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:  # arrow's own
        raise ValueError(f"column {image_column!r} holds no pictures but {rows.features[image_column]}"[:300]) from error
    texts = rows[caption_column] if caption_column else [None] * len(rows)
    return [Picture(f"row {i}", _text(text), partial(_open_cell, stored, i, image_column)) for i, text in enumerate(texts)]


def _text(value: Any) -> str | None:
    """A caption, or the first of several."""
    first = value[0] if isinstance(value, list) and value else value
    return " ".join(first.split()) if isinstance(first, str) else None


def _open_cell(stored: Any, index: int, image_column: str) -> io.BufferedIOBase:
    cell = stored[index][image_column] or {}
    if cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    if path := cell.get("path"):
        try:
            return open_file(Path(path))
        except ValueError as error:  # a zero byte
            raise DamagedImage(str(error)) from error
    raise DamagedImage("the cell is empty")
