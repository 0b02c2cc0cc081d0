"""open_clip's byte-pair tokenizer, without the cost of importing the rest of open_clip.

`import open_clip` loads torchvision and timm (seconds); the tokenizer is one self-contained file of it, loaded here by
its path. Its vocabulary is CLIP's own: 49,408 tokens, start 49406, end 49407, padding 0.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from jaxtyping import Int
from torch import Tensor

VOCAB_SIZE = 49_408


def tokenize(prompts: list[str], context_length: int) -> Int[Tensor, "B L"]:
    """(B, context_length) token ids: start, the prompt cut to fit, end, zeros."""
    return _tokenizer()(prompts, context_length=context_length)


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
