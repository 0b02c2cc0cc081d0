"""Prompts as a user types them on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xdiffusion.data.captions import PromptTable

SLOT = "class"


def expand_prompts(given: Sequence[str], table: PromptTable, count: int | None) -> list[str]:
    """The prompts of `count` images: {class} becomes every class in turn, and the list is repeated to length.

    Args:
        given: prompts; none means every class by its plainest caption.
        table: of the model's data set.
        count: images; None means one per prompt.

    Raises:
        ValueError: for a slot other than {class}.
    """
    expanded = []
    for prompt in given or ["{class}"]:
        unknown = set(re.findall(r"\{(.*?)\}", prompt)) - {SLOT}
        if unknown:
            raise ValueError(f"--prompt {prompt!r} has the unknown slot {{{unknown.pop()}}}; allowed: {{{SLOT}}}")
        classes = [names[0] for names in table.names] if f"{{{SLOT}}}" in prompt else [""]
        expanded += [prompt.replace(f"{{{SLOT}}}", name) for name in classes]
    count = count or len(expanded)
    return [expanded[i % len(expanded)] for i in range(count)]
