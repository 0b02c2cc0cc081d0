"""Prompt tables: what the classes of each data set are called, and the choice of a wording for each sample.

A table lists for every class its names, and the templates that any name fits into; the captions of a class are all
combinations. The empty prompt "" is the unconditional one of classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

MAX_CAPTION = 2**14  # letters; a text encoder sees some hundreds
PREVIEWED = 4  # captions of a set without classes


@dataclass(frozen=True)
class PromptTable:
    """The captions of a data set.

    Args:
        names: for each class the words for it, the plainest first.
        templates: strings with one {} for the name.
    """

    names: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @cached_property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """captions[label]: all captions of that class, the plainest first."""
        return tuple(tuple(t.format(name) for name in names for t in self.templates) for names in self.names)

    def choose(self, labels: Int[Tensor, " B"], wording: Float[Tensor, " B"]) -> list[str]:
        """One caption for each label; `wording` in [0, 1) picks among the class's captions."""
        tables = [self.captions[label] for label in labels.tolist()]
        return [captions[int(u * len(captions))] for captions, u in zip(tables, wording.tolist())]


def preview_table(captions: Iterable[str]) -> PromptTable:
    """The first few different captions, as classes."""
    return PromptTable(names=tuple((c,) for c in list(dict.fromkeys(captions))[:PREVIEWED]), templates=("{}",))


def is_text(caption: str) -> bool:
    """Whether it can be written in UTF-8: what Python makes of a file name in another encoding, or of half a letter, cannot."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        return False
    return True


def fault_in(caption: str) -> str:
    """Why a picture's caption cannot be used; "" of one that can."""
    if len(caption) > MAX_CAPTION:
        return f"its caption has more than {MAX_CAPTION:,} letters"
    return "" if is_text(caption) else "its caption is no Unicode text, as names in another encoding are"


_DIGITS = PromptTable(
    names=tuple(
        (str(i), word)
        for i, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
    ),
    templates=("{}", "the digit {}", "a handwritten {}"),
)

PROMPT_TABLES = {
    "image/digits": _DIGITS,
    "image/mnist": _DIGITS,
    "image/fashion_mnist": PromptTable(
        names=(
            ("t-shirt", "top"),
            ("trousers", "pants"),
            ("pullover", "sweater"),
            ("dress",),
            ("coat",),
            ("sandal",),
            ("shirt",),
            ("sneaker", "shoe"),
            ("bag", "handbag"),
            ("boot", "ankle boot"),
        ),
        templates=("{}", "a picture of the {}", "a grey {}"),
    ),
    "image/cifar10": PromptTable(
        names=(
            ("airplane", "plane"),
            ("car", "automobile"),
            ("bird",),
            ("cat",),
            ("deer",),
            ("dog",),
            ("frog",),
            ("horse",),
            ("ship", "boat"),
            ("truck", "lorry"),
        ),
        templates=("{}", "a photo of the {}", "a small {}"),
    ),
}
