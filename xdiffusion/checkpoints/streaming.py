"""Safetensors files of any size in the memory of one tensor: read by name, and copied with some tensors changed.

The format: 8 bytes, the header's length; the header, JSON {name: {dtype, shape, data_offsets}}; the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from xdiffusion.checkpoints.files import open_safetensors, write_atomically


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is asked for and held by nobody but who asked.

    metadata: the strings of the file's header. entries: {dtype, shape, data_offsets} by tensor name.

    Raises:
        CheckpointError: if the file is missing or no whole safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_safetensors(path), path.open("rb") as file:  # the first checks what the second reads
            self.entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        self.metadata: dict[str, str] = self.entries.pop("__metadata__", {})

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self.entries[name]["shape"])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.entries:
            raise KeyError(name)
        with open_safetensors(self.path) as file:  # opened anew: one map over the file would keep all that was read
            return file.get_tensor(name)

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
