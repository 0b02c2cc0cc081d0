"""Learned tokens (textual inversion, [TI]): the files in which the field exchanges them, read into embeddings by name.

diffusers   learned_embeds.safetensors / .bin     {"<cat>": (width,) or (n, width)}
A1111       .pt                                   {"string_to_param": {"*": (n, width)}, "name": "cat"}, named by the file too
A1111       .safetensors                          {"emb_params": (n, width)}, named by the file
ComfyUI     .safetensors                          {"clip_l": (n, width)} of 1.x, {"clip_h": ...} of 2.x, named by the file
OneTrainer  .safetensors                          {"emp_params": (n, width)}, named by the file; "emp_params_out" is not read
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.paths import PICKLED, weights_file
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors, widened
from xdiffusion.checkpoints.writing import save_safetensors

_NAMELESS = {"emb_params", "emp_params", "clip_l", "clip_h", "text_encoders_0"}
_BEHIND = {f"{key}_out" for key in _NAMELESS}  # OneTrainer's, added to what the text encoder gives
_OF_A_FOLDER = ("learned_embeds.safetensors", "learned_embeds.bin")


def parse_tokens_spec(text: str) -> tuple[Path, str | None]:
    """ "FILE" or "FILE=<name>" -> (path, name)."""
    path, equals, name = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), None
    return Path(path), name


def read_learned_tokens(path: Path, name: str | None = None) -> dict[str, Tensor]:
    """The embeddings of a file by name, each (n, width); one of two names is there under both.

    Args:
        path: of the file, or of a folder that holds one as diffusers names it, learned_embeds.*.
        name: what to call its token instead of the file's own names for it; for a file of one token.

    Raises:
        CheckpointError: if it is missing, damaged, holds no learned tokens, or several where a name is given.
    """
    path = weights_file(next((f for name in _OF_A_FOLDER if (f := path / name).is_file()), path), "file of learned words")
    content = load_pickled(path) if path.suffix in PICKLED else load_safetensors(path)[0]
    tokens = [(words, _rows(tensor, words[0], path)) for words, tensor in _tensors_by_words(content, path)]
    if name is not None:
        if len(tokens) != 1:
            held = ", ".join(words[0] for words, _ in tokens)
            raise CheckpointError(f"{path} holds {len(tokens)} tokens ({held}): it cannot be named {name!r}")
        tokens = [([name], rows) for _, rows in tokens]
    return {word: rows for words, rows in tokens for word in words}


def save_learned_tokens(path: Path, tokens: Mapping[str, Tensor]) -> None:
    """Write embeddings by name in diffusers' form, atomically."""
    save_safetensors(path, tokens, {"format": "pt"})


def _tensors_by_words(content: Any, path: Path) -> list[tuple[list[str], Tensor]]:
    """(words, tensor) of each token, whatever the file's form."""
    content = dict(content) if isinstance(content, Mapping) else {}
    for key in _BEHIND & content.keys():
        del content[key]
        print(f"{path}: {key!r} is left out: it is no embedding of a prompt's word", file=sys.stderr)
    if isinstance(content.get("string_to_param"), Mapping):
        inner = str(content.get("name") or path.stem)  # as it was trained; A1111 goes by the file, which may be renamed
        words = list(dict.fromkeys([path.stem, inner]))
        tokens = [(words if t == "*" else [str(t)], rows) for t, rows in content["string_to_param"].items()]
    elif {"clip_g", "text_encoders_1"} & content.keys():
        raise CheckpointError(f"{path} holds tokens of Stable Diffusion XL, whose text encoders this model does not have")
    elif len(content) == 1 and _NAMELESS & set(content):
        tokens = [([path.stem], rows) for rows in content.values()]
    else:
        tokens = [([str(token)], rows) for token, rows in content.items()]
    if not tokens or not all(isinstance(rows, Tensor) for _, rows in tokens):
        raise CheckpointError(f"{path} holds no learned tokens: neither embeddings by name nor A1111's string_to_param")
    return tokens


def _rows(tensor: Tensor, token: str, path: Path) -> Tensor:
    if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {token!r} is no learned token, it has shape {tuple(tensor.shape)}")
    rows = widened(tensor.detach()).reshape(-1, tensor.shape[-1])
    if not torch.isfinite(rows).all():
        raise CheckpointError(f"{path}: the embedding of {token!r} is not finite")
    return rows
