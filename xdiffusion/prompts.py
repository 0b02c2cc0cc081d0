"""Prompts as a user writes them, on a command line or in a config."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from xdiffusion.data.captions import PromptTable, is_text

SLOT = "class"


def expand_prompts(given: Sequence[str], table: PromptTable | None, count: int | None, source: str = "--prompt") -> list[str]:
    """The prompts of `count` images: {class} becomes every class in turn, and the list is repeated to length.

    A prompt of which there is no image is named on stderr.

    Args:
        given: prompts; none means every class by its plainest caption.
        table: of the model's data set; None for a model of images without classes.
        count: images; None means one per prompt.
        source: where they stand, named in errors.

    Raises:
        ValueError: for what is no text, a slot other than {class}, or one that is not closed; without classes for any slot
            and for no prompt.
    """
    if table is None and not given:
        raise ValueError('this model has no classes to draw: say what to draw with --prompt "TEXT"')
    allowed = {SLOT} if table else set()
    expanded = []
    for prompt in given or ["{class}"]:
        if not is_text(prompt):
            raise ValueError(f"{source} {prompt!a} is no Unicode text")
        unknown = set(re.findall(r"\{(.*?)\}", prompt)) - allowed
        known = f"allowed: {{{SLOT}}}" if table else "this model has no classes, so there are no slots"
        if table and re.search(r"[{}]", re.sub(r"\{.*?\}", "", prompt)):
            raise ValueError(f"{source} {prompt!r} has a brace without its other one; {known}")
        if unknown:
            raise ValueError(f"{source} {prompt!r} has the unknown slot {{{unknown.pop()}}}; {known}")
        if count is not None and len(expanded) >= count:
            print(f"{count} images end before {source} {prompt!r}, which is not drawn", file=sys.stderr)
        classes = [names[0] for names in table.names] if f"{{{SLOT}}}" in prompt else [""]
        expanded += [prompt.replace(f"{{{SLOT}}}", name) for name in classes]
    count = count or len(expanded)
    return [expanded[i % len(expanded)] for i in range(count)]
