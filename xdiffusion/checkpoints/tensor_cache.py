"""Tensors on the disk by a hash of everything that they depend on: nothing changed is ever served from before.

One safetensors file each, written beside its place and renamed, so that several runs may share a folder and a killed one
leaves nothing half-written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors


class TensorCache:
    """Named tensors by key.

    Args:
        folder: of the files.
        depends_on: what every entry follows from beside its own key, as JSON values: hash and settings of the model.
    """

    def __init__(self, folder: Path, depends_on: Mapping[str, Any]):
        self.folder = folder
        self.depends_on = json.dumps(dict(depends_on), sort_keys=True)

    def holds(self, key: str) -> bool:
        """Whether there are tensors of a key, which are not read."""
        return self.path(key).is_file()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, or None where there are none, or a damaged file."""
        path = self.path(key)
        try:
            return load_safetensors(path)[0] if path.is_file() else None
        except CheckpointError:
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a key.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        save_safetensors(self.path(key), tensors, {"key": key})

    def path(self, key: str) -> Path:
        """The file of a key."""
        digest = hashlib.blake2b(f"{self.depends_on}|{key}".encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"
