"""What the config in a file's header says of how to draw: the prediction, the schedule, and the text encoder's layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PROCESS = ("diffusion.prediction", "diffusion.schedule")
DRAWN_BY = (*PROCESS, "model.text_encoder.clip_skip")


def drawn_by(config: Any) -> dict[str, Any]:
    """The values below `DRAWN_BY` that a config holds, by dotted key; none where it is no config."""
    found: dict[str, Any] = {}
    for key in DRAWN_BY:
        value = value_at(config, key)
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": one for name, one in value.items()}
        elif value is not None:
            found[key] = value
    return found


def value_at(config: Any, key: str) -> Any:
    """What a config of any shape has at a dotted key; None if there is nothing."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def drawn_otherwise(config: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, its value, the other's) of all values of `drawn_by` in which two configs differ.

    A key that one of them, being older, does not have is None there: a switch counts as off then, and any other value as equal.
    """
    ours, theirs = drawn_by(config), drawn_by(other)
    for key in dict.fromkeys([*ours, *theirs]):
        one, two = ours.get(key), theirs.get(key)
        unsaid = one is None or two is None
        if (one is True or two is True) if unsaid else one != two:
            yield key, one, two
