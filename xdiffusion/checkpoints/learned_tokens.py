"""Learned tokens (textual inversion, [TI]): the files in which the field exchanges them, read into embeddings by name.

diffusers   learned_embeds.safetensors / .bin     {"<cat>": (width,) or (n, width)}
A1111       .pt                                   {"string_to_param": {"*": (n, width)}, "name": "cat", ...}
A1111       .safetensors                          {"emb_params": (n, width)}, named by the file
ComfyUI     .safetensors                          {"clip_l": (n, width)} of 1.x, {"clip_h": ...} of 2.x, named by the file
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdiffusion.checkpoints.files import PICKLED, CheckpointError, load_pickled, load_safetensors, save_safetensors

_NAMELESS = {"emb_params", "clip_l", "clip_h"}


def parse_tokens_spec(text: str) -> tuple[Path, str | None]:
    """ "FILE" or "FILE=<name>" -> (path, name)."""
    path, equals, name = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), None
    return Path(path), name


def read_learned_tokens(path: Path, name: str | None = None) -> dict[str, Tensor]:
    """The embeddings of a file by name, each (n, width).

    Args:
        path: of the file.
        name: what to call its token instead of the file's own name for it; for a file of one token.

    Raises:
        CheckpointError: if it is missing, damaged, holds no learned tokens, or several where a name is given.
    """
    content = load_pickled(path) if path.suffix in PICKLED else load_safetensors(path)[0]
    tokens = {token: _rows(tensor, token, path) for token, tensor in _named(content, path).items()}
    if name is not None:
        if len(tokens) != 1:
            raise CheckpointError(
                f"{path} holds {len(tokens)} tokens ({', '.join(tokens)}): it cannot be named {name!r}"
            )
        tokens = dict(zip([name], tokens.values()))
    return tokens


def save_learned_tokens(path: Path, tokens: Mapping[str, Tensor]) -> None:
    """Write embeddings by name in diffusers' form, atomically."""
    save_safetensors(path, tokens, {"format": "pt"})


def _named(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by token name, whatever the file's form."""
    content = content if isinstance(content, Mapping) else {}
    if isinstance(content.get("string_to_param"), Mapping):
        own = str(content.get("name") or path.stem)
        content = {own if token == "*" else str(token): rows for token, rows in content["string_to_param"].items()}
    elif "clip_g" in content:
        raise CheckpointError(
            f"{path} holds tokens of Stable Diffusion XL, whose text encoders this model does not have"
        )
    elif len(content) == 1 and _NAMELESS & set(content):
        content = dict(zip([path.stem], content.values()))
    if not content or not all(isinstance(rows, Tensor) for rows in content.values()):
        raise CheckpointError(f"{path} holds no learned tokens: neither embeddings by name nor A1111's string_to_param")
    return {str(token): rows for token, rows in content.items()}


def _rows(tensor: Tensor, token: str, path: Path) -> Tensor:
    if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {token!r} is no learned token, it has shape {tuple(tensor.shape)}")
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    if not torch.isfinite(rows).all():
        raise CheckpointError(f"{path}: the embedding of {token!r} is not finite")
    return rows
