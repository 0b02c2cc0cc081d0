"""The ways in which tests damage files."""

from __future__ import annotations

import random

INTERESTING = b'0123456789"{}[],:.-eN_*&!$\x00\x7f\x80\xff'


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut, doubled or left out at a few places; half of the times near the start, where headers are."""
    result = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        reach = min(len(result), 3000) if draw.random() < 0.5 else len(result)
        at, length = draw.randrange(reach + 1), draw.choice((1, 1, 2, 4, 8, 64))
        kind = draw.randrange(6)
        if kind < 2:
            result[at : at + 1] = bytes([draw.choice(INTERESTING) if kind else draw.randrange(256)])
        elif kind == 2:
            result[at : at + length] = b""
        elif kind == 3:
            result[at:at] = result[at : at + length] * draw.choice((1, 1, 100))
        elif kind == 4:
            result[at : at + length] = draw.choice((b"\xff", b"\x00", b"\x7f", b"9", b"[")) * length
        elif draw.random() < 0.3:
            del result[at:]
    return bytes(result)
