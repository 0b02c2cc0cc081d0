"""Reading what the next step needs while this one is computed: one thread, which decodes pictures or reads a tar."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """`read`, which begins to read the next step's part as soon as this step's is asked for.

    What a step reads is a function of its number, so nothing is read in vain but after the last one. `read` is called by
    one thread alone; what it raises is raised by the call that asks for it.

    Args:
        read: (step, part, parts) -> what that part of the step's batch needs.
    """

    def __init__(self, read: Callable[[int, int, int], T]):
        self.read = read
        self.pool = ThreadPoolExecutor(1, "reading")
        self.begun: dict[tuple[int, int, int], Future[T]] = {}

    def __call__(self, step: int, part: int, parts: int) -> T:
        asked = self.begun.pop((step, part, parts), None) or self.pool.submit(self.read, step, part, parts)
        following = step + 1, part, parts
        if following not in self.begun:
            self.begun[following] = self.pool.submit(self.read, *following)
        return asked.result()
