"""The fuzzer sees what it looks for."""

import json
import mmap
import os
import time

import fuzz_readers
import pytest
from hostile_files import READERS, Reader


def write(folder):
    (folder / "a").write_bytes(b"0" * 8)


def memory(folder):
    with mmap.mmap(-1, 2**24) as fresh:  # malloc may have memory lying about from an earlier test
        fresh.write(bytes(2**24))


@pytest.mark.parametrize(
    ("read", "first"),
    [
        (lambda folder: (folder / "a").read_bytes(), None),
        (lambda folder: 1 / ((folder / "a").read_bytes() == b"0" * 8), "ZeroDivisionError"),
        (lambda folder: (folder / "a").read_bytes() == b"0" * 8 or os._exit(3), "the process ended with 3"),
        (lambda folder: (folder / "a").read_bytes() == b"0" * 8 or time.sleep(9), "hang"),
        (memory, None),
    ],
    ids=["nothing", "crash", "death", "hang", "memory"],
)
def test_what_a_reader_does_to_damaged_files_is_counted(read, first, monkeypatch, capsys):
    monkeypatch.setitem(READERS, "test", Reader("a", write, read))
    monkeypatch.setattr(fuzz_readers, "KILL_AFTER", 2)
    monkeypatch.setattr(fuzz_readers, "MEMORY", 2**23)
    status = fuzz_readers.main(["--reader", "test", "--files", "1", "--json"])
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["files"] == 1 and status == (first is not None or read is memory)
    assert (row["first"] or "").startswith(f"seed 0: {first}" if first else "")


def test_a_refusal_is_no_crash(capsys):
    assert fuzz_readers.main(["--reader", "trainer state", "--first", "4", "--files", "12", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["files"] == 8 and row["refused"] > 4
