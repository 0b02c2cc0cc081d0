"""Reading files without running what is in them.

Weights are safetensors; what is pickled in a `.pt` or `.ckpt` is read as data. A file takes no more memory than its own
size lets expect, whatever its header says (docs/security.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.torch_files import TORCH_STARTS, read_torch_file

MAX_HEADER_BYTES = 8 * 2**20  # of a safetensors file; that of Stable Diffusion 1.5 has 0.15 MB
MAX_VALUES = 100_000  # in a pickled file, as often as they are named; Stable Diffusion's trainer state has 10,000
MAX_DEPTH = 100  # of values in values
MAX_SHARING = 4  # what all tensors of a pickled file claim, over what it stores


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated, or no safetensors file.
    """
    with open_safetensors(path) as file:
        try:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except (SafetensorError, TypeError, RuntimeError) as error:  # a dtype or a size that torch does not have
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def open_safetensors(path: Path):
    """A lazily read safetensors file; tensors are memory-mapped until they are asked for."""
    if not path.is_file():
        raise CheckpointError(f"no file at {path}")
    try:
        _check_start(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def load_pickled(path: Path, mmap: bool = False) -> Any:
    """The content of a `.pt` file: tensors and plain containers, and `pickles.UnreadObject` for a trainer's objects.

    Args:
        path: of the file.
        mmap: map the tensors instead of reading them; those of torch before 1.6 are read.

    Raises:
        CheckpointError: if the file is missing, truncated, no torch file, or holds what no weights need.
    """
    if not path.is_file():
        raise CheckpointError(f"no file at {path}")
    _check_torch_start(path)
    try:
        content = read_torch_file(path, mmap)
        _check_content(content, path.stat().st_size)
        return content
    except Exception as error:  # reading a damaged file fails with whatever it happens to hit
        reason = shorten(str(error), 200, placeholder="...") or type(error).__name__
        raise CheckpointError(f"{path} is not a torch file of plain weights: {reason}") from error


def widened(tensor: Tensor) -> Tensor:
    """A tensor of floats of 8 bits, with which torch does not compute, in float32; others as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def read_json(path: Path, max_bytes: int = 2**20) -> Any:
    """The content of a JSON file, whose values may take thirty times the memory of their text.

    Raises:
        CheckpointError: if it is missing, larger, or no JSON.
    """
    if not path.is_file():
        raise CheckpointError(f"no file at {path}")
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"it has more than {max_bytes:,} bytes")
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error!s:.200})") from error


def _check_start(path: Path) -> None:
    """See that a file begins as safetensors files do, with a header of a size that a model's can have.

    Raises:
        CheckpointError, OSError: if not.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] != b"{":
        raise CheckpointError(f"{path} is no safetensors file: {_seen_by(start)}")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise OSError(f"its header has {length:,} bytes; allowed are {MAX_HEADER_BYTES:,}")


def _check_torch_start(path: Path) -> None:
    """See that a file begins as torch's do.

    Raises:
        CheckpointError: if not.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        raise CheckpointError(f"{path} is no torch file but a safetensors file: name it {path.stem}.safetensors")
    if start and not start.startswith(TORCH_STARTS):
        raise CheckpointError(f"{path} is no torch file: {_seen_by(start)}")


def _seen_by(start: bytes) -> str:
    """What a file with this beginning is, as far as can be told."""
    known = {b"version h": "a pointer of Git LFS, not the file (git lfs pull)", b"<": "a web page, not the file"}
    what = next((f", as {known[key]}" for key in known if start.startswith(key)), "")
    return f"it begins with {start!r}{what}"


def _check_content(content: Any, file_bytes: int) -> None:
    """See that unpickled values are as many and as large as their file can hold.

    A pickle can name one list any number of times, also inside itself, and one number as a tensor of any shape.

    Raises:
        ValueError: if not.
    """
    pending, count, claimed, stored = [(content, 0)], 1, 0, {}
    while pending:
        value, depth = pending.pop()
        if isinstance(value, Tensor):
            storage, claims = value.untyped_storage(), value.numel() * value.element_size()
            if claims > storage.nbytes():
                raise ValueError(f"a tensor claims the shape {tuple(value.shape)} without the data")
            stored[storage.data_ptr()] = storage.nbytes()
            claimed += claims
        elif isinstance(value, (dict, list, tuple)):
            members = [*value, *value.values()] if isinstance(value, dict) else value
            count += len(members)
            if count > MAX_VALUES or depth > MAX_DEPTH:
                raise ValueError(f"it names more than {MAX_VALUES:,} values, or nests them more than {MAX_DEPTH} deep")
            pending += [(member, depth + 1) for member in members]
    if sum(stored.values()) > file_bytes or claimed > MAX_SHARING * file_bytes:
        raise ValueError(f"its tensors claim {max(claimed, *stored.values()):,} bytes, the file has {file_bytes:,}")
