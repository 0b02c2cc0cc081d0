"""Hashes of weights, of states and of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def state_hash(state: Mapping[str, Any]) -> str:
    """A hash of nested dicts and lists of plain values and tensors: 32 hex digits."""
    plain, tensors = plain_and_tensors(state)
    text = torch.frombuffer(bytearray(json.dumps(plain, default=str).encode()), dtype=torch.uint8)
    return content_hash(tensors | {"plain": text})


def plain_and_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain values and the tensors of nested dicts and lists, by path."""
    leaves = dict(_leaves(state, ""))
    tensors = {name: value for name, value in leaves.items() if isinstance(value, Tensor)}
    return {name: value for name, value in leaves.items() if name not in tensors}, tensors


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{name}/{key}")
    else:
        yield name, tree


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
