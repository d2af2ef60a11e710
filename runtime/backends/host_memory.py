"""Memory of backends that run on a CPU: aligned NumPy arrays."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import BackendError
from var_deploy.runtime.backends.protocol import ALIGNMENT, Array
from var_deploy.runtime.measure import WallClock

WORTH_GIVING_BACK = 1 << 24  # bytes; a page fault costs about as much as computing on 1 kB


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Allocate `size` zero bytes, aligned to 256 bytes. Raises BackendError without memory."""
    try:
        block = np.zeros(size + ALIGNMENT, np.uint8)
    except (MemoryError, ValueError):  # ValueError: more than an address can count
        raise BackendError(
            f"there is no memory for {size / 1e6:.0f} MB of buffers; use a smaller batch"
        ) from None
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size]


def host_view(array: Array) -> NDArray[Any]:
    """A NumPy view of an `Array` in host memory, without a copy."""
    block = array.owner
    assert isinstance(block, np.ndarray)  # what `HostMemory` gives its arrays
    start = array.address - block.ctypes.data
    view: NDArray[Any] = block[start : start + array.nbytes].view(array.dtype)
    return view.reshape(array.shape)


def return_freed() -> None:
    """Return memory that was freed to the system; does nothing without glibc.

    Each thread that loaded a session leaves a heap with holes: 16 MB of an int8 d16, 20 MB in fp32.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


class HostShared:
    """`Shared` memory of a CPU backend: host and backend use the same bytes."""

    def __init__(self, size: int) -> None:
        self.host = aligned_bytes(size)
        self.address = int(self.host.ctypes.data)

    def upload(self) -> None:
        pass

    def download(self) -> None:
        pass


class HostMemory:
    """`Memory` on the host; freed when no array refers to it any more."""

    def allocate(self, size: int) -> Array:
        block = aligned_bytes(size)
        return Array(int(block.ctypes.data), (size,), block.dtype, block)

    def share(self, size: int) -> HostShared:
        return HostShared(size)

    def synchronize(self) -> None:
        pass

    def clock(self) -> WallClock:
        return WallClock(self.synchronize)

    def discard(self, array: Array) -> None:
        """Return the pages of `array` to the system; does nothing for small arrays or off Linux."""
        if sys.platform != "linux" or array.nbytes < WORTH_GIVING_BACK:
            return
        first = -(-array.address // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (array.address + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # private pages without a file: the next touch finds zeros (madvise(2))
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Return the freed memory of C and C++ libraries to the system, where glibc keeps it.

    A session's weights are freed in pieces of some megabytes, which glibc keeps for the process.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
