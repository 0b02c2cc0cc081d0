"""Damage files and read them: crashes, hangs and memory of every reader of files from strangers.

    python tests/fuzz_readers.py --files 10000

For each reader, N copies of a small whole file are damaged, each by a seed of its own, and read in a child process. A crash
is anything but a value or the one error that is documented (ValueError, of which CheckpointError and ConfigError are
kinds) with the file's name; the end of the process too. A hang is a read of more than a second of processor time. Memory is
the growth of the process at the worst moment of one read; the bound is twice the file, or 256 MB. Ends with status 1 if any
bound is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from damage import mutated
from hostile_files import READERS, Reader

from xdiffusion.cli import REPOSITORY, Parser, positive_int, run

sys.path.append(str(REPOSITORY / "bench"))
from measure import peak_resident

HANG, KILL_AFTER = 1.0, 30  # seconds
MEMORY = 256 * 2**20


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--files", type=positive_int, default=10_000, metavar="N", help="per reader (10000)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out N that a run before did (0)")
    parser.add_argument("--seconds", type=positive_int, metavar="S", help="stop a reader after S seconds")
    parser.add_argument("--reader", metavar="TEXT", default="", help="only those with this in their names")
    parser.add_argument("--json", action="store_true", help="print JSON lines and nothing else")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    rows = []
    for name in READERS:
        if args.reader in name:
            rows.append({"reader": name, **fuzz(name, range(args.first, args.files), args.seconds)})
            print(json.dumps(rows[-1]) if args.json else line(rows[-1]), flush=True)
    return int(any(row["crashes"] or row["hangs"] or row["peak_mb"] * 2**20 > MEMORY for row in rows))


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['reader']:<32}{row['files']:>7} files{row['refused']:>7} refused{row['crashes']:>4} crashes"
        f"{row['hangs']:>4} hangs{row['slowest']:>7.2f} s{row['peak_mb']:>7.1f} MB  {row['first'] or ''}"
    )


def fuzz(name: str, seeds: range, seconds: int | None) -> dict[str, Any]:
    """The figures of one reader over the files of these seeds; `first` is the first crash or hang: its seed and what it was."""
    figures = {"files": 0, "refused": 0, "crashes": 0, "hangs": 0, "slowest": 0.0, "peak_mb": 0.0, "first": None}
    deadline = time.monotonic() + (seconds or float("inf"))
    while figures["files"] < len(seeds) and time.monotonic() < deadline:
        for outcome in in_child(name, seeds[figures["files"] :], deadline):
            figures["files"] += 1
            figures["refused"] += outcome["refused"]
            figures["crashes"] += outcome["crash"] is not None
            figures["hangs"] += outcome["seconds"] > HANG
            figures["slowest"] = max(figures["slowest"], outcome["seconds"])
            figures["peak_mb"] = max(figures["peak_mb"], outcome["bytes"] / 2**20)
            if figures["first"] is None and (outcome["crash"] or outcome["seconds"] > HANG):
                figures["first"] = f"seed {seeds[figures['files'] - 1]}: {outcome['crash'] or 'hang'}"
    return figures


def in_child(name: str, seeds: range, deadline: float) -> Iterator[dict[str, Any]]:
    """The outcomes of the seeds as a child process reports them; its death is the last of them."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w", buffering=1) as report, tempfile.TemporaryDirectory() as scratch, silence():
            for outcome in outcomes(name, seeds, Path(scratch)):
                report.write(json.dumps(outcome) + "\n")
                if time.monotonic() > deadline:
                    break
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as report:
        for text in report:
            yield json.loads(text)
    _, status = os.waitpid(child, 0)
    if status:
        number = os.waitstatus_to_exitcode(status)
        hung = number == -signal.SIGALRM
        crash = None if hung else f"the process ended with {number}"
        yield {"refused": 0, "crash": crash, "seconds": float(KILL_AFTER) if hung else 0.0, "bytes": 0}


def outcomes(name: str, seeds: Iterable[int], folder: Path) -> Iterator[dict[str, Any]]:
    """Damage the file by each seed, and read it."""
    reader = READERS[name]
    reader.write(folder)
    reader.read(folder)  # imports, and what the first read of a process costs
    damaged = folder / reader.damaged
    whole = damaged.read_bytes()
    for seed in seeds:
        outcome: dict[str, Any] = {"refused": 0, "crash": None}
        damaged.write_bytes(mutated(whole, random.Random(seed)))
        signal.alarm(KILL_AFTER)
        started = time.process_time()
        outcome["bytes"] = peak_resident(partial(read, reader, folder, outcome))
        outcome["seconds"] = round(time.process_time() - started, 3)
        signal.alarm(0)
        yield outcome


def read(reader: Reader, folder: Path, outcome: dict[str, Any]) -> None:
    """Read, and note what came of it."""
    try:
        reader.read(folder)
    except ValueError as error:
        outcome["refused"] = 1
        if not reader.is_named(error, folder):
            outcome["crash"] = f"names no file: {' '.join(str(error).split())[:100]}"
    except Exception as error:
        outcome["crash"] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What readers print is not looked at."""
    with Path(os.devnull).open("w") as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield


if __name__ == "__main__":
    sys.exit(run(main))
