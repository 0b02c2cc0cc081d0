"""Downloads over a network that may not be there: one that swallows packets is given up within seconds."""

from __future__ import annotations

import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def hub_downloads(*configs: Any) -> Iterator[None]:
    """Within this block downloads from the Hugging Face hub do not try again and again, nor log it: an error says it all.

    Without a network the hub's library would go on for half a minute or more; told that it is offline it looks in its cache.

    Args:
        configs: modules of other libraries that have read HF_HUB_OFFLINE into a constant of their own.
    """
    from huggingface_hub import constants

    places = [constants, *configs]
    before, logged = [place.HF_HUB_OFFLINE for place in places], logging.root.manager.disable
    offline = any(before) or not reachable(constants.ENDPOINT)
    logging.disable(logging.CRITICAL)
    try:
        for place in places:
            place.HF_HUB_OFFLINE = offline
        yield
    finally:
        logging.disable(logged)
        for place, was in zip(places, before):
            place.HF_HUB_OFFLINE = was
