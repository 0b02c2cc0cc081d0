"""Writing files whole or not at all.

Every write goes to a temporary file beside the target, is flushed to the disk, and is renamed over the target, so a
killed run leaves the last good file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path) and move the result to `path`.

    Raises:
        CheckpointError: if the folder cannot be written; nothing is left behind then.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes a private file
        temporary.replace(path)
        _flush_names(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's errors are RuntimeErrors
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(f"cannot write {path}: {reason}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, atomically.

    Raises:
        CheckpointError: see `write_atomically`.
    """
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_pickled(path: Path, content: Any) -> None:
    """torch.save, atomically.

    Raises:
        CheckpointError: see `write_atomically`.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # Python says why it cannot write, torch does not
            torch.save(content, file)

    write_atomically(path, write)


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors (made contiguous, on the CPU) and string metadata as one safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_in_order(contiguous, temporary, metadata))


def save_in_order(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """safetensors' save_file, whose metadata are in another order each time, with them sorted: equal content, equal bytes."""
    save_file(tensors, path, dict(metadata))
    if not (tensors and metadata):  # of no tensors, safetensors 0.4.3 writes a header with a comma too much
        return
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        entries = json.loads(header)
        entries = {"__metadata__": dict(sorted(entries.pop("__metadata__", {}).items())), **entries}
        ordered = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header))
        if len(ordered) == len(header):  # as both write JSON the same way
            file.seek(8)
            file.write(ordered)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to write a folder, which is moved to its place at the end of the block: it is there whole or not at all.

    Raises:
        CheckpointError: if it is there already, or the folder around it cannot be written to.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is there already; a folder is not overwritten")
    parent = ensure_writable(folder.absolute().parent)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}.") as temporary:
        written = Path(temporary) / folder.name
        yield written
        written.rename(folder)


def ensure_writable(folder: Path) -> Path:
    """See that a folder takes files, before time is spent on what is to go there; returns it.

    A folder that is not there yet is made by what is written first: until then its nearest parent is looked at.

    Raises:
        CheckpointError: if it cannot be written to.
    """
    try:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
        if not there.is_dir():
            what = "a file, not a folder" if there.exists() else "a link to nothing"
            raise CheckpointError(f"cannot write to {folder}: {there} is {what}")
        with tempfile.TemporaryFile(dir=there):
            return folder
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder; nothing else may be writing there."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    """See that a renaming outlives a power failure, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network disks know no such thing
        pass
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
