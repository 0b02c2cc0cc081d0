"""Parts of a file as tensors that are read as they are used: each a private map of its own, gone with the tensor."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import torch
from jaxtyping import UInt8
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def mapped_bytes(file: int, begin: int, length: int) -> UInt8[Tensor, " length"]:
    """Bytes of a file, at least one; writing to them leaves the file as it is.

    Python's own `mmap` keeps the file open for each map, and a process may have 1,024 files open where Stable Diffusion has
    1,130 tensors.

    Args:
        file: its descriptor, which may be closed afterwards.
        begin, length: in bytes.

    Raises:
        OSError: if it cannot be mapped, or has become shorter: the system kills who reads behind its end.
    """
    page = begin - begin % mmap.ALLOCATIONGRANULARITY
    end = begin + length
    if os.fstat(file).st_size < end:
        raise OSError("the file has become shorter")
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = _LIBC.mmap(None, end - page, protection, mmap.MAP_PRIVATE, file, page)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    part = (ctypes.c_ubyte * (end - page)).from_address(address)
    weakref.finalize(part, _LIBC.munmap, address, end - page).atexit = False
    return torch.frombuffer(part, dtype=torch.uint8, count=length, offset=begin - page)
