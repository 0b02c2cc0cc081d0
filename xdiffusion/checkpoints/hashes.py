"""Hashes of weights and of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError


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
