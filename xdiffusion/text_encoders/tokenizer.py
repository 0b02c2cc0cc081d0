"""open_clip's byte-pair tokenizer, without the cost of importing the rest of open_clip.

`import open_clip` loads torchvision and timm (seconds); the tokenizer is one self-contained file of it, loaded here by
its path. Its vocabulary is CLIP's own: 49,408 tokens, start 49406, end 49407, padding 0 (open_clip, Stable Diffusion 2.x)
or the end token (OpenAI's weights in Stable Diffusion 1.x).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Int
from torch import Tensor

VOCAB_SIZE = 49_408
START_TOKEN = VOCAB_SIZE - 2
END_TOKEN = VOCAB_SIZE - 1
LONGEST_WORD = 256  # letters


def token_ids(text: str, enough: float = math.inf) -> list[int]:
    """The tokens of a text alone: no start, no end.

    The time that open_clip takes for a word grows with the square of its length (300,000 letters: seven minutes). A word of
    more than LONGEST_WORD letters, as no language has, is taken to be several.

    Args:
        text: of any length.
        enough: tokens after which the rest may be left out.
    """
    tokenizer, tokens = _tokenizer(), []
    words = (found[0] for found in tokenizer.pat.finditer(tokenizer.clean_fn(text)))
    for piece in (word[i : i + LONGEST_WORD] for word in words for i in range(0, len(word), LONGEST_WORD)):
        tokens += _word(piece)
        if len(tokens) >= enough:
            break
    return tokens


@lru_cache(maxsize=10_000)
def _word(word: str) -> tuple[int, ...]:
    tokenizer = _tokenizer()
    letters = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
    known = letters in tokenizer.cache  # <start_of_text> and <end_of_text>
    tokens = tuple(tokenizer.encoder[token] for token in tokenizer.bpe(letters).split(" "))
    if not known:
        tokenizer.cache.pop(letters, None)  # where open_clip keeps every word for ever
    return tokens


def framed(rows: Sequence[Sequence[int]], context_length: int, pad_token: int) -> Int[Tensor, "B L"]:
    """Each row of token ids between start and end, cut and padded to context_length."""
    tokens = torch.full((len(rows), context_length), pad_token)
    for i, row in enumerate(rows):
        ids = [START_TOKEN, *row[: context_length - 2], END_TOKEN]
        tokens[i, : len(ids)] = torch.tensor(ids)
    return tokens


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """(id by token, merges "a b" in order), start and end spelled as OpenAI's and transformers' files spell them."""
    tokenizer = _tokenizer()
    ids = {token: i for token, i in tokenizer.encoder.items() if i < START_TOKEN}
    ids |= {"<|startoftext|>": START_TOKEN, "<|endoftext|>": END_TOKEN}
    return ids, [" ".join(pair) for pair in tokenizer.bpe_ranks]


@cache
def _tokenizer():
    return _tokenizer_module().SimpleTokenizer()


def _tokenizer_module() -> ModuleType:
    if "open_clip" in sys.modules:  # already paid for
        from open_clip import tokenizer

        return tokenizer
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("open_clip is missing: pip install open_clip_torch")
    spec = spec_from_file_location("xdiffusion_open_clip_tokenizer", Path(package.origin).parent / "tokenizer.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
