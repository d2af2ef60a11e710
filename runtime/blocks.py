"""Named arrays side by side in one piece of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from var_deploy.runtime.backends.protocol import ALIGNMENT, Array, Memory

Fields = Mapping[str, tuple[tuple[int, ...], DTypeLike]]


def pack(fields: Fields) -> tuple[dict[str, int], int]:
    """Offset of each field, on a multiple of 256, and the bytes of all."""
    offsets, position = {}, 0
    for name, (shape, dtype) in fields.items():
        offsets[name] = position
        size = math.prod(shape) * np.dtype(dtype).itemsize
        position += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, position


class _Packed(Mapping[str, Array]):
    """The fields of one piece of memory, by name."""

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
    """Arrays that the graphs alone read and write."""

    def __init__(self, memory: Memory, fields: Fields) -> None:
        self._memory, self._base = memory, memory.allocate(pack(fields)[1])
        super().__init__(self._base.address, self._base.owner, fields)

    def discard(self) -> None:
        """See `Memory.discard`."""
        self._memory.discard(self._base)


class SharedBlock(_Packed):
    """Arrays that the host fills or reads; one copy moves all of them.

    Attributes:
        host: the same arrays for the host, by name.
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
        self._shared.upload()

    def download(self) -> None:
        self._shared.download()
