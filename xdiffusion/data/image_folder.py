"""`image/folder`: a folder of pictures with captions from text files, from metadata, or from the files' names."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn
from unicodedata import normalize

from xdiffusion.data.bounded_lines import MAX_ROW, BoundedLines
from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.data.captions import MAX_CAPTION
from xdiffusion.data.image_files import DamagedImage, Picture, open_file
from xdiffusion.places import looked_for_in

MAX_ABSENT = 1000  # pictures that a list names, are not there, and are remembered by name
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw")
NOT_READ = "this format is not read; convert to PNG or JPEG"
SIDECARS = (".txt", ".caption")  # the latter is kohya's; of both beside one picture the former counts
METADATA = ("metadata.jsonl", "metadata.csv")


def load_image_folder(
    image_size: int,
    data_dir: str | None = None,
    *,
    bucket_multiple: int = 64,
    max_aspect: float = 2.0,
    random_crop: bool = False,
    flip: bool = False,
    captions: Sequence[str] | None = None,
) -> CaptionedImages:
    """The pictures of a folder and of the folders in it, and one printed line about them.

    The captions are those of the first that there is: a `.txt` or `.caption` file beside any picture (then every picture needs
    one);
    `metadata.jsonl` or `metadata.csv` with `file_name` and `text` (or `caption`), there or in folders below, each for its
    own; the files' names, with spaces for underscores and without a number at the end.

    Args:
        data_dir: the folder.
        image_size, bucket_multiple, max_aspect, random_crop, flip, captions: see `CaptionedImages`.

    Raises:
        ValueError: if there is no folder or no usable picture in it, or its metadata is wrong.
    """
    if data_dir is None:
        raise ValueError("image/folder needs the folder of the pictures: --data_dir FOLDER")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise ValueError(f"--data_dir {folder} is no folder{looked_for_in(folder)}")
    files = picture_files(folder, SUFFIXES + UNREAD)
    if not files:
        raise ValueError(f"--data_dir {folder} holds no picture; the endings looked for are {', '.join(SUFFIXES)}")
    captions_from, pictures, absent = _captioned(folder, files)
    images = CaptionedImages(
        f"image/folder {folder}",
        pictures,
        captions_from,
        image_size=image_size,
        bucket_multiple=bucket_multiple,
        max_aspect=max_aspect,
        random_crop=random_crop,
        flip=flip,
        captions=captions,
        absent=absent,
    )
    print(images.summary)
    return images


def picture_files(folder: Path, endings: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files of a folder and of the folders in it that have one of the endings, without hidden ones."""
    return sorted(path for path in _entries(folder) if path.suffix.lower() in endings)


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder and in those below it, without hidden ones. Links to folders are followed after all others, so that
    none is entered twice, and each first under its own name."""
    entered, waiting = set(), deque([folder])
    while waiting:
        for place, folders, files in os.walk(waiting.popleft()):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if os.path.realpath(place) in entered:
                folders.clear()
                continue
            entered.add(os.path.realpath(place))
            paths = [Path(place, name) for name in folders]
            waiting += [path for path in paths if path.is_symlink()]
            yield from paths
            yield from (Path(place, name) for name in files if not name.startswith("."))


def _captioned(folder: Path, files: Sequence[Path]) -> tuple[str, list[Picture], int]:
    """Where the captions come from, the pictures, and how many more a list names."""
    names = [str(file.relative_to(folder)) for file in files]
    texts = {path: path.suffix.lower() for path in picture_files(folder, SIDECARS) if path.is_file()}
    by_stem = {path.with_suffix(""): path for path in sorted(texts, key=lambda path: -SIDECARS.index(texts[path]))}
    beside = [by_stem.get(file.with_suffix("")) for file in files]
    if any(beside):
        endings = " and ".join(ending for ending in SIDECARS if ending in {texts[path] for path in beside if path})
        unused = ", ".join(str(path.relative_to(folder)) for path in _metadata_files(folder)[:3])
        captions_from = f"{endings} files" + f" ({unused} is not used)" * bool(unused)
        return captions_from, [_with_sidecar(folder, name, text) for name, text in zip(names, beside)], 0
    metadata = _metadata_files(folder)
    if metadata:
        found, absent = {}, 0
        present = {normalize("NFC", name): name for name in names}  # macOS writes an accent as a letter of its own
        entered = {place.resolve() for place in {folder, *(path.parent for path in (*files, *metadata))}}
        for path in metadata:
            of_file, not_there = _read_metadata(path, folder, present, entered)
            found |= {name: text for name, text in of_file.items() if text or name not in found}
            absent += not_there
        listed = [_picture(folder, name, text) for name, text in found.items()]
        rest = [_picture(folder, name, None) for name in names if name not in found]
        return ", ".join(str(path.relative_to(folder)) for path in metadata[:3]), listed + rest, absent
    return "file names", [_picture(folder, name, _words(file)) for name, file in zip(names, files)], 0


def _metadata_files(folder: Path) -> list[Path]:
    """Of the folder and each one in it the first of METADATA, the outer ones first."""
    files = [path for path in _entries(folder) if path.name in METADATA and path.is_file()]
    found = {path.parent: path for path in sorted(files, key=lambda path: METADATA.index(path.name), reverse=True)}
    return sorted(found.values(), key=lambda path: (len(path.parts), path))


def _picture(folder: Path, name: str, caption: str | None) -> Picture:
    if Path(name).suffix.lower() in UNREAD:
        return Picture(name, None, _open_unread, uncaptioned=NOT_READ)
    return Picture(name, caption, partial(open_file, folder / name))


def _open_unread() -> NoReturn:
    raise DamagedImage(NOT_READ)


def _with_sidecar(folder: Path, name: str, text: Path | None) -> Picture:
    try:
        return _picture(folder, name, text and _sidecar(text))
    except UnicodeError:
        return replace(_picture(folder, name, None), uncaptioned="caption is not UTF-8")
    except OSError as error:
        return replace(_picture(folder, name, None), uncaptioned=f"caption cannot be read: {error.strerror}")


def _sidecar(beside: Path) -> str:
    """The caption in a text file.

    Raises:
        UnicodeError: if it is not in UTF-8, nor in UTF-16 with its mark.
    """
    with beside.open("rb") as stream:
        marked = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    with beside.open(encoding="utf-16" if marked else "utf-8-sig") as stream:
        text = stream.read(MAX_CAPTION + 1)
    if "\0" in text:
        raise UnicodeError(f"{beside} is in UTF-16 without its mark")
    return _caption(text)


def _caption(text: str) -> str:
    """On one line; one that is too long is kept so long that it is seen."""
    return text[: MAX_CAPTION + 1] if len(text) > MAX_CAPTION else " ".join(text.split())


def _words(file: Path) -> str:
    """a_red_circle_003.png -> "a red circle"; a name that is only a number stays."""
    words = " ".join(file.stem.replace("_", " ").split())
    return re.sub(r"[\s-]*\(?\d+\)?$", "", words) or words


def _read_metadata(path: Path, folder: Path, present: Mapping[str, str], entered: Set[Path]) -> tuple[dict[str, str], int]:
    """file_name -> text, by paths below the folder, and how many more are named that are not there.

    Args:
        path: of the file, in which names are as seen from its own folder.
        present: names that are known to be in the folder, by their normal form.
        entered: the folder and others that links in it led to, resolved.

    Raises:
        ValueError: naming the line that is wrong.
    """
    found, absent, again = {}, 0, 0
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        name, texts = row.get("file_name"), [row.get(key) for key in ("text", "caption")]
        if not isinstance(name, str) or not name or not all(isinstance(text, str | None) for text in texts):
            raise ValueError(f"{where} must have the texts file_name and text (or caption), not {str(dict(row))[:100]}")
        name = os.path.normpath(path.parent.relative_to(folder) / name)
        normal = normalize("NFC", name)
        if normal in present:
            name = present[normal]
        else:
            try:
                name = _inside(folder, name, entered)
                there = (folder / name).exists()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(f"{where}: file_name {name!r:.80} {reason}") from error
            absent += not there
            if not there and absent > MAX_ABSENT:
                continue
        again += name in found
        found[name] = _caption(texts[0] or texts[1] or "")
    if again:
        print(f"warning: {path}: {again} rows name a picture again; the last one's caption counts", file=sys.stderr)
    return found, max(absent - MAX_ABSENT, 0)


def _inside(folder: Path, name: str, entered: Set[Path]) -> str:
    """A name as seen from the folder.

    Raises:
        ValueError: if it is not below the folder or, links followed, below one that was entered.
    """
    path = folder / name
    real = Path(os.path.realpath(path))  # resolve() fails on a link to itself
    if not path.is_relative_to(folder) or entered.isdisjoint((real, *real.parents)):
        raise ValueError("leads out of the folder")
    return str(path.relative_to(folder))


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    read: Callable = _jsonl_rows if path.suffix == ".jsonl" else _csv_rows
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = BoundedLines(file, path)
            yield from read(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read behind line {lines.number}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _jsonl_rows(lines: BoundedLines) -> Iterator[tuple[int, Mapping[str, object]]]:
    for line in lines:
        lines.room = MAX_ROW
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise ValueError(f"{lines.path}, line {lines.number} is no JSON: {reason}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{lines.path}, line {lines.number} must be a JSON object, not {line.strip()[:100]}")
        yield lines.number, row


def _csv_rows(lines: BoundedLines) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(lines)
    columns = set(reader.fieldnames or ())
    if "file_name" not in columns or not columns & {"text", "caption"}:
        named = f"{reader.fieldnames!s:.200}"
        raise ValueError(f"{lines.path} must have the columns file_name and text (or caption), not {named}")
    for row in reader:
        lines.room = MAX_ROW
        if more := [value for value in row.pop(None, ()) if value.strip()]:
            raise ValueError(
                f"{lines.path}, line {lines.number} has more values than the {len(reader.fieldnames)} columns, the last "
                f'{more[-1]!r:.80}: a caption with commas must be in double quotes, as in picture.png,"a red fox, sitting"'
            )
        yield lines.number, row
