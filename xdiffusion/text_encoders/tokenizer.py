"""open_clip's byte-pair tokenizer, without the cost of importing the rest of open_clip.

`import open_clip` loads torchvision and timm (seconds); the tokenizer is one self-contained file of it, loaded here by
its path. Its vocabulary is CLIP's own: 49,408 tokens, start 49406, end 49407, padding 0 (open_clip, Stable Diffusion 2.x)
or the end token (OpenAI's weights in Stable Diffusion 1.x).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Int
from torch import Tensor

VOCAB_SIZE = 49_408
START_TOKEN = VOCAB_SIZE - 2
END_TOKEN = VOCAB_SIZE - 1


def tokenize(prompts: list[str], context_length: int) -> Int[Tensor, "B L"]:
    """(B, context_length) token ids: start, the prompt cut to fit, end, zeros."""
    return framed([token_ids(prompt) for prompt in prompts], context_length)


def token_ids(text: str) -> list[int]:
    """The tokens of a text alone: no start, no end, of any length."""
    return _tokenizer().encode(text)


def framed(rows: Sequence[Sequence[int]], context_length: int, pad_token: int = 0) -> Int[Tensor, "B L"]:
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
