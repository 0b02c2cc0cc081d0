"""Weights in one file, safetensors or pickled, or cut into several with an index that says which tensor is in which.

    model.safetensors.index.json    {"weight_map": {tensor: "model-00001-of-00002.safetensors", ...}, ...}

The names are those of whoever made the folder: none may lead out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.paths import PICKLED, SAFETENSORS
from xdiffusion.checkpoints.reading import MAX_HEADER_BYTES, load_pickled, read_json
from xdiffusion.checkpoints.streaming import StoredTensors

MAX_NAME = 64  # letters of at most four bytes: no file system here knows longer ones


def open_weights(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """A file's tensors, mapped, and its header; of a pickled one, those at the top or under "state_dict", without a header.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    if path.suffix not in PICKLED:
        stored = StoredTensors(path)
        return stored, stored.metadata
    content = load_pickled(path, mmap=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    named = content if isinstance(content, dict) else {}
    return {str(name): tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}, {}


def read_indexed(index: Path) -> dict[str, Tensor]:
    """The tensors that an index names, mapped, by name; all files lie beside it.

    Raises:
        CheckpointError: if the index is damaged or names a file elsewhere, or a file or a tensor in it is missing.
    """
    places, shards = open_shards(index)
    return {name: shards[file][name] for name, file in places.items()}


def open_shards(index: Path) -> tuple[dict[str, str], dict[str, Mapping[str, Tensor]]]:
    """The name of a file by tensor, as an index has it, and the mapped tensors of each file by its name.

    Raises:
        CheckpointError: see `read_indexed`.
    """
    places = _weight_map(index)
    shards = {}
    for file in dict.fromkeys(places.values()):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent / file} is not there, which {index.name} names")
        shards[file], _ = open_weights(index.parent / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{index.parent / file} has no tensor {name:.100}, which {index.name} says is there")
    return places, shards


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor, every file the name, without a folder, of one of the kind that the index is for."""
    kind = ".bin" if ".bin.index." in index.name else SAFETENSORS
    content = read_json(index, MAX_HEADER_BYTES)
    try:
        places = content["weight_map"]
        files = set(places.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error})") from error
    for file in files:
        # read as Windows does, a path is one there or here
        is_name = isinstance(file, str) and len(file) < MAX_NAME and PureWindowsPath(file).name == file
        if not is_name or not file.endswith(kind):
            raise CheckpointError(f"{index} names {file!r:.100}, which is no {kind} file beside it")
    return places
