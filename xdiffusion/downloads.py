"""Downloads over a network that may not be there: one that swallows packets is given up within seconds."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_WITHOUT_ANSWER = 5.0


@contextmanager
def impatient() -> Iterator[None]:
    """Within this block no socket waits longer for an answer; torchvision's downloads would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_WITHOUT_ANSWER)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def reachable(url: str) -> bool:
    """Whether anything answers at an address."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS_WITHOUT_ANSWER).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True
