"""Words that a pipeline of diffusers was saved with, beyond CLIP's vocabulary: textual inversion that went into the model.

The rows of the text encoder's table behind the vocabulary's are theirs, and the tokenizer's files name them: by id in
tokenizer.json and in tokenizer_config.json's added_tokens_decoder, by name in added_tokens.json, as versions differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.diffusers_settings import VOCABULARY
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.reading import read_json

_Pairs = Callable[[Any], Iterable[tuple[Any, Any]]]  # a file's content -> (id, word)
_FILES: dict[str, tuple[int, _Pairs]] = {  # by name: bytes that it may have, and its pairs
    "added_tokens.json": (2**20, lambda content: ((i, name) for name, i in content.items())),
    "tokenizer_config.json": (
        2**20,
        lambda content: ((i, token["content"]) for i, token in content.get("added_tokens_decoder", {}).items()),
    ),
    "tokenizer.json": (  # with CLIP's vocabulary and merges, 3.6 MB
        2**23,
        lambda content: ((token["id"], token["content"]) for token in content.get("added_tokens", ())),
    ),
}


def added_words(tokenizer: Path, table: Tensor) -> dict[str, Tensor]:
    """What a text encoder's table holds behind CLIP's vocabulary, by name.

    A word of n vectors, which diffusers saves as <cat>, <cat>_1, <cat>_2, ... and puts in the place of <cat>, is one (n,
    width). A row without a name is no word: some pad the table to a round number.

    Args:
        tokenizer: the folder of that name.
        table: (tokens, width), of the text encoder beside it.

    Raises:
        CheckpointError: if a file of the tokenizer is damaged.
    """
    if table.ndim != 2 or len(table) <= VOCABULARY:
        return {}
    names = {i: name for i, name in _names(tokenizer) if VOCABULARY <= i < len(table)}
    words: dict[str, tuple[str, Tensor]] = {}  # of two that differ in capitals the last, as the tokenizer takes it
    end = VOCABULARY
    for first in sorted(names):
        if first < end:  # a further vector of the word before
            continue
        end = first + 1
        while names.get(end) == f"{names[first]}_{end - first}":
            end += 1
        words[names[first].lower()] = names[first], table[first:end]
    return dict(words.values())


def _names(tokenizer: Path) -> Iterator[tuple[int, str]]:
    """(id, word) of all that the tokenizer's files add."""
    for file, (max_bytes, pairs) in _FILES.items():
        path = tokenizer / file
        if path.is_file():
            content = read_json(path, max_bytes)
            try:
                yield from [(int(i), str(name)) for i, name in pairs(content)]
            except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
                raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error!s:.200})") from error
