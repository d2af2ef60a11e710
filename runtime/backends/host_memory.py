"""The memory of backends that run on a CPU: NumPy's, aligned."""

from __future__ import annotations

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
    """Zeros [size] whose first byte lies on a multiple of 256. Raises BackendError for lack of
    memory."""
    try:
        block = np.zeros(size + ALIGNMENT, np.uint8)
    except (MemoryError, ValueError):  # ValueError: more than an address can count
        raise BackendError(
            f"there is no memory for {size / 1e6:.0f} MB of buffers; use a smaller batch"
        ) from None
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size]


def host_view(array: Array) -> NDArray[Any]:
    """The values of an array that lies in host memory: the same bytes, not a copy."""
    block = array.owner
    assert isinstance(block, np.ndarray)  # what `HostMemory` gives its arrays
    start = array.address - block.ctypes.data
    view: NDArray[Any] = block[start : start + array.nbytes].view(array.dtype)
    return view.reshape(array.shape)


class HostShared:
    """`Shared` where there is one memory only."""

    def __init__(self, size: int) -> None:
        self.host = aligned_bytes(size)
        self.address = int(self.host.ctypes.data)

    def upload(self) -> None:
        pass

    def download(self) -> None:
        pass


class HostMemory:
    """`Memory` on the host; freed when nothing refers to it any more."""

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
        """Where pages cannot be given back, or too few to be worth the faults, nothing happens."""
        if sys.platform != "linux" or array.nbytes < WORTH_GIVING_BACK:
            return
        first = -(-array.address // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (array.address + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # private pages without a file: the next touch finds zeros (madvise(2))
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
