"""The files of torch.save, read without torch.load: a pickle, read as data (see `pickles`), and the storages beside it.

since 1.6    a zip file of stored records: NAME/data.pkl, NAME/data/<key> for each storage, NAME/byteorder
before       pickles of a magic number, a version and the machine, then the pickle, that of the list of the storages' keys,
             and for each its number of elements (8 bytes) and its bytes

One reader of either, ours, so that what is checked is what is read: two readers of a zip file can see two contents in it.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from xdiffusion.checkpoints.mapping import mapped_bytes
from xdiffusion.checkpoints.pickles import Unpickler

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
MAX_DIRECTORY_BYTES = 2**20  # of a zip file; Stable Diffusion's with its trainer's state has 0.4 MB
MAX_PICKLE_BYTES = 2**24
_MARK = b"PK\3\4"
TORCH_STARTS = (_MARK, b"\x80")  # of a zip file, of a pickle


def read_torch_file(path: Path, mmap: bool = False) -> Any:
    """The content of a file: plain values and containers, tensors, and `pickles.UnreadObject` for all else.

    Args:
        path: of the file.
        mmap: map the tensors of a zip file instead of reading them.

    Raises:
        Exception: of any kind if it is damaged; ValueError if it asks for more than weights need.
    """
    with path.open("rb") as file:
        is_archive = file.read(len(_MARK)) == _MARK
        file.seek(0)
        return _read_archive(file, mmap) if is_archive else _read_stream(file)


def _read_archive(file: BinaryIO, mmap: bool) -> Any:
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        records = _records(archive, os.fstat(file.fileno()).st_size)
        (pickled,) = [name for name in records if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if records[pickled].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has {records[pickled].file_size:,} bytes; allowed are {MAX_PICKLE_BYTES:,}")
        if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are in another machine's byte order")
        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, elements: int) -> Tensor:
            record = records[f"{folder}data/{key}"]
            if record.file_size < elements * dtype.itemsize:
                raise ValueError(f"its storage {key} claims {elements:,} elements of {dtype} without the data")
            if key not in storages:
                storages[key] = _mapped_record(file, record) if mmap else _record(archive, record)
            return storages[key][: elements * dtype.itemsize].view(dtype)

        content = Unpickler(io.BytesIO(archive.read(pickled)), storage).load()
        storages.clear()  # as the memo in `pickles`: the reader lives on and would hold what the content lets go of
        return content


def _check_directory(file: BinaryIO) -> None:
    """See that a zip file's directory is where it ends, and of a size that a torch file's can have.

    Raises:
        ValueError: if not.
    """
    file.seek(max(0, os.fstat(file.fileno()).st_size - 98))
    end = file.read()
    if end[-22:-18] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise ValueError("it is a cut zip file")
    length = int.from_bytes(end[-10:-6], "little")
    if end[-42:-38] == b"PK\6\7":  # the form for more than 4 GB, which torch always writes too
        length = int.from_bytes(end[-58:-50], "little")
    if length > MAX_DIRECTORY_BYTES:
        raise ValueError(f"its directory has {length:,} bytes; allowed are {MAX_DIRECTORY_BYTES:,}")


def _records(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The records by name, seen to be stored as they are: a compressed one inflates to anything.

    Raises:
        ValueError: if not.
    """
    records = {record.filename: record for record in archive.infolist()}
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
        raise ValueError("its records are compressed, which torch never does")
    if len(records) < len(archive.infolist()) or sum(r.file_size for r in records.values()) > file_bytes:
        raise ValueError("its records overlap")
    return records


def _record(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> Tensor:
    """The bytes of a record, which have the checksum that it carries."""
    content = torch.empty(record.file_size, dtype=torch.uint8)
    with archive.open(record) as source:
        _fill(content, source)
    return content


def _mapped_record(file: BinaryIO, record: zipfile.ZipInfo) -> Tensor:
    """The bytes of a record, mapped for itself: of what is converted one by one, no two copies are held."""
    file.seek(record.header_offset + 26)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    start = record.header_offset + 30 + name + extra
    if not record.file_size:
        return torch.empty(0, dtype=torch.uint8)
    return mapped_bytes(file.fileno(), start, record.file_size)


def _read_stream(file: BinaryIO) -> Any:
    left = os.fstat(file.fileno()).st_size
    storages: dict[str, tuple[torch.dtype, Tensor]] = {}

    def storage(dtype: torch.dtype, key: str, elements: int) -> Tensor:
        nonlocal left
        if key not in storages:
            length = elements * dtype.itemsize
            if not 0 <= length <= left:
                raise ValueError(f"its storage {key} claims {length:,} bytes; the file has {left:,} for it")
            left -= length
            storages[key] = dtype, torch.empty(length, dtype=torch.uint8)
        return storages[key][1].view(dtype)

    unpickler = Unpickler(file, storage)
    if [unpickler.load(), unpickler.load()] != [MAGIC, VERSION]:
        raise ValueError("it does not begin as torch's files do")
    unpickler.load()  # of the machine that wrote it
    content, keys = unpickler.load(), unpickler.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it has no list of its storages")
    for key in keys:
        dtype, data = storages.pop(key)
        if int.from_bytes(file.read(8), "little") * dtype.itemsize != data.numel():
            raise ValueError(f"its storage {key} has another length than its pickle says")
        _fill(data, file)
    if storages:
        raise ValueError(f"it lacks {len(storages)} storages that its pickle names")
    return content


def _fill(target: Tensor, source: Any) -> None:
    if source.readinto(target.numpy()) != target.numel():
        raise ValueError("it is cut")
