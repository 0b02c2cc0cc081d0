r"""Weights in prompts, as in A1111's web UI: how much of the text embedding each word contributes.

    (word)      weight 1.1, ((word)) 1.1 * 1.1        [word]      weight 1 / 1.1
    (word:1.3)  weight 1.3                            \( \) \[ \] \\   the characters themselves

What else A1111 reads in prompts is not done here. Of that, what no sentence has is refused, <lora:file:0.8> and words that
change on the way ([fox:dog:0.5], [fox|dog]); BREAK and AND, which may be words, are taken as such: see `remarks`.

A weight multiplies the hidden states of its tokens; the whole is then scaled so that its mean stays what it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

EMPHASIS = 1.1
SMALLEST_MEAN = 1e-3  # over the mean absolute value
MAX_DEPTH = 32  # of brackets in brackets, where a round one alone weighs 21
_PIECES = re.compile(r"\\.?|[()\[\]]|:\s*(?P<weight>[+-]?[\d.]+)\s*[)\]]|[^\\()\[\]:|]+|[:|]", re.DOTALL)
_CLOSES = {")": "(", "]": "["}
_FILE_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>", re.IGNORECASE)
_KEYWORDS = {"BREAK": "begins no new chunk of tokens", "AND": "composes no prompts"}


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The texts of a prompt in order, each with its weight; neighbours of one weight are one text.

    Raises:
        ValueError: for a bracket without its partner or too many in each other, a weight that is no number, or words that
            change on the way.
    """
    texts: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # the brackets around the current place, and how many texts stood before each
    for piece in _PIECES.finditer(prompt):
        text, given = piece[0], piece["weight"]
        if text.startswith("\\"):
            texts.append((text[1:], 1.0))
        elif text in ("(", "["):
            opened.append((text, len(texts)))
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"prompt {prompt!r:.100}: more than {MAX_DEPTH} brackets are open at {text!r}")
        elif text in _CLOSES or given:
            bracket, start = opened.pop() if opened else ("", 0)
            if bracket != _CLOSES[text[-1]]:
                raise ValueError(f"prompt {prompt!r:.100}: {text!r} closes nothing; write \\{text[-1]} for the character")
            if given and bracket == "[":
                raise _changing(repr(text), prompt)
            factor = EMPHASIS if bracket == "(" else 1 / EMPHASIS
            factor = _number(given, prompt) if given else factor
            texts[start:] = [(inside, weight * factor) for inside, weight in texts[start:]]
        elif text == "|" and opened and opened[-1][0] == "[":
            raise _changing("'|' between brackets", prompt)
        else:
            texts.append((text, 1.0))
    if opened:
        bracket = opened[-1][0]
        raise ValueError(f"prompt {prompt!r:.100}: {bracket!r} is never closed; write \\{bracket} for the character")
    return _merged(texts)


def refuse_file_tags(prompt: str, words: Collection[str]) -> None:
    """See that no <lora:file:0.8> or its like stands in a prompt, but for those that are learned words.

    Raises:
        ValueError: naming it.
    """
    for tag in _FILE_TAG.findall(prompt):
        if tag.lower() not in words:
            raise ValueError(
                f"prompt {prompt!r:.100}: {tag!r:.100} names a file, which is no text here: give a LoRA as "
                "--lora_path FILE:SCALE; hypernetworks are not read"
            )


def remarks(prompts: Iterable[str]) -> list[str]:
    """A line for each keyword of A1111 that stands in prompts and is taken as a word."""
    text = "\n".join(prompts)
    found = {word: does for word, does in _KEYWORDS.items() if re.search(rf"\b{word}\b", text)}
    return [f"{word} in a prompt is taken as a word, and {does} as in A1111" for word, does in found.items()]


def weighted(hidden: Float[Tensor, "B L D"], weights: Float[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
    """weights * hidden, scaled per prompt to the mean it had; where all weights are 1, hidden itself, bit for bit.

    A mean of nothing, as behind a norm that was never trained, is no measure, and that prompt is not scaled.
    """
    product = hidden * weights[..., None].to(hidden)
    before, after, spread = (x.float().mean(dim=(1, 2), keepdim=True) for x in (hidden, product, product.abs()))
    scale = torch.where(after.abs() > SMALLEST_MEAN * spread, before / after, torch.ones_like(after))
    return product * scale.to(hidden)


def _changing(what: str, prompt: str) -> ValueError:
    return ValueError(
        f"prompt {prompt!r:.100}: {what} would change words on the way, as in A1111, which is not done here; "
        "write \\[ and \\] for the characters"
    )


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"prompt {prompt!r:.100}: the weight {text!r} must be a number, as in (word:1.2)") from None


def _merged(texts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return [("".join(text for text, _ in run), weight) for weight, run in groupby(texts, key=lambda piece: piece[1])]
