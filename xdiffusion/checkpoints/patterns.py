"""Regular expressions of module names, as LoRA files and configs hold them: only such as answer soon.

Python's matcher tries every way to share a name among repetitions and alternatives; `(a+)+$` takes for ever on thirty
letters. Few of each in an alternative of the whole, and none repeated as a whole, leave a polynomial of low degree: such
alternatives are tried one after another, so what they cost adds up.
"""

from __future__ import annotations

import re

MAX_LENGTH = 300  # of a pattern, and of the name that is compared with it
MAX_ALTERNATIVES = 16
_LIMITS = {r"[*+{]": 2, r"(?<!\()\?": 2, r"\(": 3}  # of an alternative; that of (?: repeats nothing
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_FLAGS = re.compile(r"\(\?[aiLmsux-]+[:)]")  # of which x lets blanks and comments stand before a repetition
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\\\]])*\]|.", re.DOTALL)  # an escape, a set of characters, a character


def module_pattern(pattern: str) -> re.Pattern[str]:
    """A compiled pattern of module names.

    Raises:
        ValueError: if it is no regular expression, or one that could take for ever.
    """
    few = len(pattern) <= MAX_LENGTH and pattern.count("|") <= MAX_ALTERNATIVES
    if not few or any(len(re.findall(p, part)) > n for part in _alternatives(pattern) for p, n in _LIMITS.items()):
        raise ValueError(f"{pattern[:80]!r} is too long, or has too many repetitions, groups or alternatives")
    if _REPEATED_GROUP.search(pattern):
        raise ValueError(f"{pattern[:80]!r} repeats a group, which can take for ever to compare")
    if _FLAGS.search(pattern):
        raise ValueError(f"{pattern[:80]!r} sets flags: a module's name needs none")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def _alternatives(pattern: str) -> list[str]:
    """What `|` divides outside of groups; all of it where a comment may hide what a bracket means."""
    if "#" in pattern:
        return [pattern]
    parts, depth = [""], 0
    for token in _TOKEN.findall(pattern):
        depth += (token == "(") - (token == ")")
        if token == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def is_ending(pattern: str, name: str) -> bool:
    """Whether a pattern is all of a name or its last parts, as peft reads the keys of rank_pattern and alpha_pattern.

    Raises:
        ValueError: see `module_pattern`; or if the name is longer than any module's.
    """
    if re.fullmatch(r"[\w.-]*", pattern):  # a plain name, of which there may be hundreds
        return f".{name}".endswith(f".{pattern}")
    if len(name) > MAX_LENGTH:
        raise ValueError(f"{name[:80]!r}... is no module's name: it has {len(name):,} letters")
    expression = module_pattern(pattern)
    starts = [0, *(place.end() for place in re.finditer(r"\.", name))]
    return any(expression.fullmatch(name, start) for start in starts)
