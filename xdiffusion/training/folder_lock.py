"""Locks: one run in a folder at a time, for two would rotate and set aside each other's checkpoints; one maker of a file."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.writing import ensure_writable

FILE = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within this block the folder, made if it is not there, is this run's; the system frees it where the process dies.

    Raises:
        CheckpointError: if another run has it, or if it cannot be written to.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error
    with file:
        if not _locked(file):
            raise CheckpointError(
                f"{folder} is in use by another run: wait for its end, or name another folder with --output_path"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def in_use(folder: Path) -> bool:
    """Whether a run has a folder; also True where that cannot be told, as the disk knows no locks."""
    try:
        with (folder / FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Within this block this process alone makes the file at a path: another that begins such a block waits for its end.

    Raises:
        CheckpointError: if its folder cannot be written to.
    """
    beside, told = path.with_suffix(FILE), False
    ensure_writable(path.parent).mkdir(parents=True, exist_ok=True)
    while True:
        with beside.open("w") as file:
            if _locked(file):
                try:
                    yield
                finally:
                    with suppress(OSError):
                        beside.unlink()
                return
        if not told:
            print(f"another run makes {path}: waiting for its end", flush=True)
            told = True
        time.sleep(0.5)


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks know no locks
        pass
    return os.fstat(file.fileno()).st_nlink > 0  # else its run has just ended, and a third may have made a new one
