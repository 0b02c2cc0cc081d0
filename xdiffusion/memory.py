"""A full memory, of the machine or of its GPU: how it is told, and where it is said what takes less."""

from __future__ import annotations

TAKES_LESS = "what takes less is in docs/lessons/04-stable-diffusion.md, Troubleshooting"
# of a GPU that this process has filled, or another one before this has any; of torch on a CPU; of CUDA's libraries
SAID = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")


def is_full_memory(error: BaseException) -> bool:
    """By its text, where it is a RuntimeError: torch has a class of its own for some of them, and is not imported to tell."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)
    return said or isinstance(error, MemoryError)
