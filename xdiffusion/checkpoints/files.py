"""Writing and reading weight files: whole or not at all, and never by running what is in them.

Every write goes to a temporary file beside the target, is flushed to the disk, and is renamed over the target, so a
killed run leaves the last good file. Weights are safetensors; what is pickled in a `.pt` or `.ckpt` is read as data.
A file takes no more memory than its own size lets expect, whatever its header says (docs/security.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xdiffusion.checkpoints.torch_files import read_torch_file
from xdiffusion.places import nothing_at

SAFETENSORS = ".safetensors"
PICKLED = (".pt", ".ckpt", ".bin", ".pth")
MAX_HEADER_BYTES = 8 * 2**20  # of a safetensors file; that of Stable Diffusion 1.5 has 0.15 MB
MAX_VALUES = 100_000  # in a pickled file, as often as they are named; Stable Diffusion's trainer state has 10,000
MAX_DEPTH = 100  # of values in values
MAX_SHARING = 4  # what all tensors of a pickled file claim, over what it stores


class CheckpointError(ValueError):
    """A file that cannot be used: which one, and why."""


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


def _flush_names(folder: Path) -> None:
    """See that a renaming outlives a power failure, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network disks know no such thing
        pass
    finally:
        os.close(descriptor)


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


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder; nothing else may be writing there."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


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


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors (made contiguous, on the CPU) and string metadata as one safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, dict(metadata)))


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
    """The content of a `.pt` file: tensors and plain containers, and `pickles.Nothing` for a trainer's objects.

    Args:
        path: of the file.
        mmap: map the tensors instead of reading them; those of torch before 1.6 are read.

    Raises:
        CheckpointError: if the file is missing, truncated, no torch file, or holds what no weights need.
    """
    if not path.is_file():
        raise CheckpointError(f"no file at {path}")
    try:
        content = read_torch_file(path, mmap)
        _check_content(content, path.stat().st_size)
        return content
    except Exception as error:  # reading a damaged file fails with whatever it happens to hit
        reason = shorten(str(error), 200, placeholder="...") or type(error).__name__
        raise CheckpointError(f"{path} is not a torch file of plain weights: {reason}") from error


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


def existing_weights(path: Path, what: str = "checkpoint") -> tuple[Path, str | None]:
    """The file (of peft and diffusers, the folder) that stands for `path`, and a line to print if it is another one.

    Lessons and older commands name `diffusion-10000.pt` where this project writes `diffusion-10000.safetensors`.

    Raises:
        CheckpointError: if neither exists, calling it `what`; up to five files there of a similar name are listed.
    """
    if path.is_file() or is_adapter_folder(path) or is_pipeline_folder(path):
        return path, None
    if path.suffix in PICKLED and path.with_suffix(SAFETENSORS).is_file():
        twin = path.with_suffix(SAFETENSORS)
        return twin, f"{path} is not there; reading {twin.name} beside it"
    raise CheckpointError(nothing_at(path, what, [SAFETENSORS]))


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter of peft, or one for each component of a pipeline."""
    return any((folder / "adapter_config.json").is_file() for folder in (path, path / "unet", path / "text_encoder"))


def is_pipeline_folder(path: Path) -> bool:
    """Whether a folder holds a diffusers pipeline of a latent diffusion model."""
    return (path / "unet" / "config.json").is_file() and (path / "vae").is_dir()


def refuse_leftover(path: Path) -> None:
    """Complain of a file of another LoRA where it would be read as a part of what is to be written.

    Raises:
        CheckpointError: if it is there.
    """
    if path.exists():
        raise CheckpointError(f"{path} of another LoRA would be read with what is to be written: move it away")


def refuse_overwriting(read: Sequence[Path], output: Path) -> None:
    """Complain of an output that is one of the files or folders that are read for it.

    Raises:
        CheckpointError: if it is one.
    """
    for path in read:
        there = path if path.exists() else path.with_suffix(SAFETENSORS)  # which is read in its place
        if there.exists() and output.exists() and there.samefile(output):
            raise CheckpointError(f"{output} would be overwritten, and is read: name another output")


def weights_file(path: str | Path, what: str = "checkpoint") -> Path:
    """`existing_weights` for a command line: the line about another name goes to stderr.

    Raises:
        CheckpointError: if there is none.
    """
    found, note = existing_weights(Path(path), what)
    if note:
        print(note, file=sys.stderr)
    return found


def content_hash(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """A hash of names, dtypes, shapes and bits, independent of order, device and memory layout: 32 hex digits.

    Of tensors with fractions in another dtype, if one is given: they are converted one after another.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """A hash of a file's bytes: 32 hex digits.

    Raises:
        CheckpointError: if it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _check_start(path: Path) -> None:
    """See that a file begins as safetensors files do, with a header of a size that a model's can have.

    Raises:
        CheckpointError, OSError: if not.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] != b"{":
        raise CheckpointError(f"{path} is no safetensors file: it begins with {start!r}")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise OSError(f"its header has {length:,} bytes; allowed are {MAX_HEADER_BYTES:,}")


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
