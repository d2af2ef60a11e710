"""Blocks of memory that hold several named arrays, packed one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from var_deploy.runtime.backends.protocol import ALIGNMENT, Array, Memory

Fields = Mapping[str, tuple[tuple[int, ...], DTypeLike]]


def pack(fields: Fields) -> tuple[dict[str, int], int]:
    """Offset of each field in bytes, a multiple of 256, and the size of all fields together."""
    offsets, position = {}, 0
    for name, (shape, dtype) in fields.items():
        offsets[name] = position
        size = math.prod(shape) * np.dtype(dtype).itemsize
        position += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, position


class _Packed(Mapping[str, Array]):
    """A mapping from field name to the `Array` of that field in one block of memory."""

    def __init__(self, address: int, owner: object, fields: Fields) -> None:
        offsets, self.nbytes = pack(fields)
        self._arrays = {
            name: Array(address + offsets[name], shape, np.dtype(dtype), owner)
            for name, (shape, dtype) in fields.items()
        }

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class Block(_Packed):
    """A block in the backend's memory that the host never reads or writes."""

    def __init__(self, memory: Memory, fields: Fields) -> None:
        self._memory, self._base = memory, memory.allocate(pack(fields)[1])
        super().__init__(self._base.address, self._base.owner, fields)

    def discard(self) -> None:
        """Discard the contents of the block, see `Memory.discard`."""
        self._memory.discard(self._base)


class SharedBlock(_Packed):
    """A block that exists on the host and in the backend's memory; one copy moves all its arrays.

    Attributes:
        host: name → the host's copy of the array, writable.
    """

    def __init__(self, memory: Memory, fields: Fields) -> None:
        self._shared = shared = memory.share(pack(fields)[1])
        super().__init__(shared.address, shared.host, fields)
        self.host: dict[str, NDArray[Any]] = {}
        for name, array in self.items():
            start = array.address - shared.address
            view: NDArray[Any] = shared.host[start : start + array.nbytes].view(array.dtype)
            self.host[name] = view.reshape(array.shape)

    def upload(self) -> None:
        """Copy the block from the host to the backend, see `Shared.upload`."""
        self._shared.upload()

    def download(self) -> None:
        """Copy the block from the backend to the host, see `Shared.download`."""
        self._shared.download()
