"""Safetensors files of any size in the memory of one tensor: read by name, and copied with some tensors changed.

The format: 8 bytes, the header's length; the header, JSON {name: {dtype, shape, data_offsets}}; the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.mapping import mapped_bytes
from xdiffusion.checkpoints.reading import open_safetensors
from xdiffusion.checkpoints.writing import write_atomically

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

MAX_TENSORS = 32_768  # a process may have 65,530 maps; Stable Diffusion has 1,130 tensors, a LoRA of XL some thousand


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file by name, each mapped when it is asked for and held by nobody but who asked.

    A tensor is a private map of its own part of the file: its bytes are read as they are used, and writing to it leaves
    the file as it is. Only what is alive counts as this process's memory, so a model that converts its tensors one by
    one never holds two copies.

    metadata: the strings of the file's header. entries: {dtype, shape, data_offsets} by tensor name.

    Raises:
        CheckpointError: if the file is missing, no whole safetensors file, or one of more than MAX_TENSORS.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_safetensors(path):  # which checks what is read below
            self._file = os.open(path, os.O_RDONLY)  # kept: another file may take this one's name
        weakref.finalize(self, os.close, self._file)
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        self.entries = json.loads(os.pread(self._file, length, 8))
        self._start = 8 + length
        self.metadata: dict[str, str] = self.entries.pop("__metadata__", None) or {}
        if len(self.entries) > MAX_TENSORS:
            raise CheckpointError(f"{path} holds {len(self.entries):,} tensors; allowed are {MAX_TENSORS:,}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self.entries[name]["shape"])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.entries:
            raise KeyError(name)
        entry = self.entries[name]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name} is of dtype {entry['dtype']}, which cannot be read here")
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if not prod(shape):
            try:
                return torch.empty(shape, dtype=dtype)
            except (TypeError, RuntimeError) as error:  # (2**63, 0) is a shape of no bytes, but none of torch's
                raise CheckpointError(f"{self.path}: {name} cannot have the shape {tuple(shape)}") from error
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        try:
            return mapped_bytes(self._file, begin, end - begin).view(dtype).view(shape)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be mapped ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def copy_safetensors(
    source: StoredTensors,
    path: Path,
    change: Callable[[str, Tensor], Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Write a copy, atomically, in which each tensor is change(name, tensor), of the same shape and dtype.

    Args:
        source: what is copied.
        path: of the copy.
        change: called once for each tensor.
        metadata: of the copy.
        progress: wrapped around the names, as tqdm is.
    """
    header = json.dumps({"__metadata__": dict(metadata), **source.entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors are aligned
    names = sorted(source, key=lambda name: source.entries[name]["data_offsets"])

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in progress(names):
                tensor = change(name, source[name])
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    write_atomically(path, write)
