"""What the entry scripts share: one-line errors, and flags that become config overrides. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

USAGE_ERROR = 2


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call main(argv) and return its exit status; a user's mistake (ValueError) becomes one line and status 2.

    Set XDIFFUSION_TRACEBACK=1 to see where an error was raised.
    """
    try:
        return main(argv) or 0
    except ValueError as error:
        if os.environ.get("XDIFFUSION_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR


def overrides_from_flags(args: argparse.Namespace, keys: dict[str, str]) -> list[str]:
    """`--set` assignments, then the flags that were given, as KEY=VALUE; a flag beats the config and `--set`.

    Args:
        args: parsed; a flag that was not given is None.
        keys: config key by flag name.
    """
    flags = [f"{key}={getattr(args, flag)}" for flag, key in keys.items() if getattr(args, flag) is not None]
    return [*args.set, *flags]


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value
