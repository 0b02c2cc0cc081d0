"""The lines of a text file, read one by one, none of them longer than a line of its kind can be."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

MAX_ROW = 2**20  # letters


class BoundedLines:
    """Iterates over the lines of an open file.

    Args:
        file: open for reading text.
        path: for messages.

    Attributes:
        room: letters that may still come; whoever has done with a row sets it to MAX_ROW again.

    Raises:
        ValueError: by the iteration, when more letters come.
    """

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path = file, path
        self.number = 0
        self.room = MAX_ROW

    def __iter__(self) -> BoundedLines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(self.room + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.room -= len(line)
        if self.room < 0:
            raise ValueError(f"{self.path}, line {self.number}: a row of more than {MAX_ROW:,} letters")
        return line
