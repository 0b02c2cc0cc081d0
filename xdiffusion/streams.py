"""Where the commands print: a terminal that names in files cannot command, and outputs that may lose their reader."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # but tab, line feed and carriage return
READER_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


class _Wrapped:
    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Plain(_Wrapped):
    """A terminal that is given no control characters but ends of lines, tabs and a progress bar's way back to its line.

    Names in files of strangers are printed, and a terminal takes some of them for commands.
    """

    def write(self, text: str) -> int:
        return self._stream.write(CONTROLS.sub("?", text))


class _Lasting(_Wrapped):
    """An output that leads nowhere once its reader is gone."""

    def write(self, text: str) -> int:
        self._lasting(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._lasting(self._stream.flush)

    def _lasting(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def plain_terminal() -> Iterator[None]:
    """Within this block nothing that is printed can command the terminal; what goes to a file or a pipe is as it is."""
    with _wrapped(lambda stream: _Plain(stream) if stream and stream.isatty() else stream):
        yield


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within this block a run goes on without the reader of its output: `tee`, which Ctrl-C in a terminal ends too, or a
    terminal that is closed. Where an output was closed before Python began, it leads nowhere from the start."""
    with _wrapped(lambda stream: _Lasting(stream or open(os.devnull, "w"))):  # noqa: PTH123
        yield
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # not at Python's end, which would complain


@contextmanager
def _wrapped(wrap: Callable[[TextIO | None], Any]) -> Iterator[None]:
    streams = sys.stdout, sys.stderr  # None where it was closed before Python began
    sys.stdout, sys.stderr = map(wrap, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
