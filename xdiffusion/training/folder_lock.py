"""One run in a folder at a time: two would write, rotate and set aside each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from xdiffusion.checkpoints.files import CheckpointError

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


def wait_until_free(folder: Path) -> None:
    """Wait for the end of the run that has the folder, if one has it."""
    path, told = folder / FILE, False
    while path.is_file():
        with suppress(FileNotFoundError), path.open("r+") as file:
            if _locked(file):  # by a process that is gone
                return
        if not told:
            print(f"{folder} is in use by another run: waiting for its end")
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
