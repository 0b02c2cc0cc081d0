"""The members of a tar file, header by header: nothing is unpacked, and nothing is believed that takes memory.

Python's tarfile reads an extended header of any length, and a map of holes in it into numbers of 28 bytes each, and keeps
every member. A header is 512 bytes, with data behind it in blocks of 512: the ustar form, in which GNU's long names and
pax' paths and sizes are members of their own before the one that they are of.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
MAX_EXTENSION = 2**16  # bytes of a long name or of pax' records
_RECORD = re.compile(rb"(\d{1,5}) ([^=]{1,200})=")


@dataclass(frozen=True)
class Member:
    """A file in the tar: its name, and where its bytes are. is_file: no link, device, or file with holes."""

    name: str
    start: int
    size: int
    is_file: bool
    is_folder: bool


def tar_members(path: Path) -> Iterator[Member]:
    """The members in their order; whether their bytes are all there is not looked at.

    Raises:
        tarfile.TarError, ValueError, OSError: if a header is damaged or too long, or the end is missing.
    """
    with path.open("rb") as file:
        extended: dict[str, str] = {}
        while (header := file.read(BLOCK)) and header.strip(b"\0"):
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                content = _extension(file, info)
                if info.type == tarfile.XHDTYPE:
                    extended |= _pax_records(content)
                elif info.type == tarfile.GNUTYPE_LONGNAME:
                    extended["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
                continue
            has_holes = info.type == tarfile.GNUTYPE_SPARSE or "GNU.sparse" in extended
            size = int(extended.get("size", info.size)) if info.isreg() else 0
            start = file.tell()
            yield Member(extended.get("path", info.name), start, size, info.isreg() and not has_holes, info.isdir())
            if size < 0:
                raise tarfile.ReadError(f"a member of {size} bytes")
            file.seek(start + _in_blocks(size))
            extended = {}
        if not header:
            raise tarfile.ReadError("it is cut: the blocks of zeros that end a tar are missing")


def _extension(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    """What an extended header holds."""
    if not 0 <= info.size <= MAX_EXTENSION:
        raise tarfile.ReadError(f"an extended header of {info.size:,} bytes; allowed are {MAX_EXTENSION:,}")
    content = file.read(_in_blocks(info.size))
    if len(content) < info.size:
        raise tarfile.ReadError("an extended header is cut")
    return content[: info.size]


def _pax_records(content: bytes) -> dict[str, str]:
    """Of the records "LENGTH KEY=VALUE\\n" the path, the size, and whether there are holes."""
    records, at = {}, 0
    while found := _RECORD.match(content, at):
        end = at + int(found[1])
        if end <= found.end():
            raise tarfile.ReadError("a pax record is damaged")
        key = "GNU.sparse" if found[2].startswith(b"GNU.sparse") else found[2].decode("utf-8", "replace")
        if key in ("path", "size", "GNU.sparse"):
            records[key] = content[found.end() : end - 1].decode("utf-8", "surrogateescape")
        at = end
    return records


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
