"""Maps a checkpoint file into memory, and reads tensors from it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from var_deploy.errors import CheckpointError
from var_deploy.export.checkpoint.pickled_names import (
    DTYPES,
    BadFileError,
    PickledTensor,
    RefusedFileError,
)

MAX_DIRECTORY = 4 << 20  # bytes of a zip file's directory, some 50 000 records
ITEM_SIZES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint file, described but not yet read.

    Attributes:
        dtype: as torch spells it; what the file says where torch does not know it.
        kind: "" for an ordinary tensor, else such as "sparse"; then it cannot be read.
        stored: bytes that it lies in; fewer than its own where values are repeated by strides.
        read: makes the tensor, as a view of the mapped file where it can.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: int
    read: Callable[[], Tensor]
    kind: str = ""

    @property
    def excess(self) -> int:
        """Bytes that reading takes beyond those of the file, where strides repeat values."""
        if self.kind or self.dtype not in ITEM_SIZES:
            return 0
        return max(0, prod(self.shape) * ITEM_SIZES[self.dtype] - self.stored)


class MappedFile:
    """A file mapped copy-on-write: pages are read when touched, writes never reach the file."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        try:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            raise CheckpointError(f"{path} is empty; download it again") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be mapped: {error.strerror}") from None
        self.size = len(self._map)

    def bytes(self, start: int, end: int) -> bytes:
        return self._map[start:end]

    def seekable(self) -> SeekableBytes:
        return SeekableBytes(self._map)

    def tensor(self, storage: tuple[int, int], said: PickledTensor) -> StoredTensor:
        """Return a tensor in the bytes of its storage. Raises BadFileError where it exceeds
        them."""
        if said.kind or said.dtype is None or said.storage is None:
            return StoredTensor(said.shape, str(said.dtype), 0, torch.Tensor, said.kind)
        size = said.dtype.itemsize
        unit = 1 if said.storage.dtype is None else said.storage.dtype.itemsize
        stored = said.storage.length * unit
        start, end = storage
        start += said.storage.first * unit
        if start + stored > end:
            raise BadFileError(
                f"storage {said.storage.key[:20]!r} has {end - storage[0]} bytes, expected {stored}"
            )
        span = 0
        if 0 not in said.shape:
            steps = zip(said.shape, said.stride, strict=True)
            span = 1 + sum((n - 1) * stride for n, stride in steps)
            if (said.offset + span) * size > stored:
                raise BadFileError(f"{list(said.shape)} lies outside its storage")
        read = partial(self._read, start + said.offset * size, span, said)
        return StoredTensor(said.shape, str(said.dtype).removeprefix("torch."), stored, read)

    def _read(self, start: int, span: int, said: PickledTensor) -> Tensor:
        """Read `span` elements from a byte offset, with the strides of the tensor."""
        assert said.dtype is not None
        if not span:
            return torch.empty(said.shape, dtype=said.dtype)
        buffer: Any = self._map
        if start % said.dtype.itemsize:  # old files know no alignment
            buffer = bytearray(self._map[start : start + span * said.dtype.itemsize])
            start = 0
        flat = torch.frombuffer(buffer, dtype=said.dtype, count=span, offset=start)
        return flat.as_strided(said.shape, said.stride, 0)


@dataclass
class SeekableBytes:
    """A mapped file for `zipfile`, with a bound on the directory that `zipfile` would read."""

    _map: mmap.mmap
    _at: int = field(default=0)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        to = offset + (0, self._at, len(self._map))[whence]
        if to < 0:
            raise OSError(f"a record before the file's beginning ({to})")
        self._at = to
        return to

    def read(self, count: int = -1) -> bytes:
        end = len(self._map) if count < 0 else min(self._at + count, len(self._map))
        if end - self._at > MAX_DIRECTORY:
            raise RefusedFileError(
                f"a directory of more than {MAX_DIRECTORY >> 20} MB; save the state_dict() alone"
            )
        taken = self._map[self._at : end]
        self._at += len(taken)
        return taken
