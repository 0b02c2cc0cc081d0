"""Words of textual inversion from files of other people, as a command line names them, and whether prompts hold them."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Container, Sequence
from pathlib import Path

import torch
from torch import Tensor

from xdiffusion.checkpoints.learned_tokens import parse_tokens_spec, read_learned_tokens
from xdiffusion.model import DiffusionModel
from xdiffusion.text_encoders.clip import PromptSyntax


def add_learned_tokens(
    model: DiffusionModel, specs: Sequence[str], prompts: Sequence[str], syntax: PromptSyntax = "plain"
) -> None:
    """Give the model the words of each FILE[=NAME], say which, and of which files no prompt holds one.

    Where one of a file's two names for a word is another file's already, as of one A1111 embedding at two steps, the other
    one serves.

    Raises:
        ValueError: if a file is missing or damaged, or its words cannot be added, as those of another width.
    """
    files = []
    for path, name in map(parse_tokens_spec, specs):
        tokens = _without_taken_names(read_learned_tokens(path, name), model.text_encoder.learned_ids)
        try:
            model.text_encoder.add_tokens(tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        files.append((path, {word.strip().lower() for word in tokens}))
        print(f"{path}: {', '.join(f'{token} ({len(rows)} vectors)' for token, rows in tokens.items())}")
    for path, words in files:
        warn_if_unused(model, path, words, prompts, syntax)


def warn_if_unused(
    model: DiffusionModel, path: str | Path, words: Collection[str], prompts: Sequence[str], syntax: PromptSyntax
) -> None:
    """Say so if a file brought words, in lower case, and no prompt holds one of them."""
    if not words or any(model.text_encoder.learned_words_in(prompt, syntax) & set(words) for prompt in prompts):
        return
    written = " or ".join(_escaped(word) if syntax == "weighted" else word for word in sorted(words))
    print(f"warning: {path}: no prompt holds {written}", file=sys.stderr)


def _escaped(word: str) -> str:
    """As a prompt with weights must write it."""
    return re.sub(r"([()\[\]\\])", r"\\\1", word)


def _without_taken_names(tokens: dict[str, Tensor], taken: Container[str]) -> dict[str, Tensor]:
    free = {name: rows for name, rows in tokens.items() if name.strip().lower() not in taken}
    also_free = [any(torch.equal(rows, other) for other in free.values()) for rows in tokens.values()]
    return free if all(also_free) else tokens
