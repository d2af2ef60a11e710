"""What the scale loop asks of an inference library: memory, graphs, launches.

A backend owns a memory (the host's or a device's) and opens graphs that read and write it. The
loop sees addresses and shapes alone, so the same loop drives a CPU and a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from var_deploy.bundle.files import GraphFile

ALIGNMENT = 256  # what TensorRT asks of an address, and no less than any vector unit wants


@dataclass(frozen=True, eq=False)
class Array:
    """A typed view of a backend's memory, C-contiguous.

    Attributes:
        address: of the first byte, in the backend's memory.
        owner: what keeps that memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = field(repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) along the first axis: the same memory."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return Array(self.address + start * row, shape, self.dtype, self.owner)


Arrays = Mapping[str, Array]


class Shared(Protocol):
    """Memory that both sides see: `host` here, `address` in the backend's memory.

    On a CPU they are the same bytes, and both copies do nothing.
    """

    @property
    def host(self) -> NDArray[np.uint8]: ...

    @property
    def address(self) -> int: ...

    def upload(self) -> None:
        """Copy host → backend, in the order of the launches around it."""
        ...

    def download(self) -> None:
        """Copy backend → host; `host` is valid after `Memory.synchronize`."""
        ...


class Clock(Protocol):
    """Marks moments in the order of the work, see `ScaleLoop.start_clock`.

    Attributes:
        each: mark the start and the end of every launch, not only of a generation.
        source: what is read, for a report.
    """

    each: bool
    source: str

    def mark(self) -> None: ...

    def laps(self) -> list[float]:
        """Seconds between the marks since the last call; waits for the work."""
        ...

    def close(self) -> None: ...


class Memory(Protocol):
    """Allocations live until the backend is closed. All start at a multiple of 256, as zeros."""

    def allocate(self, size: int) -> Array:
        """`size` bytes for the graphs alone, uint8 [size]. Raises BackendError if there is no
        room."""
        ...

    def share(self, size: int) -> Shared:
        """`size` bytes that the host fills or reads."""
        ...

    def synchronize(self) -> None:
        """Wait until everything launched and copied so far is done."""
        ...

    def discard(self, array: Array) -> None:
        """What `array` holds will not be read again before it is written; it may come back as
        zeros. Memory of the host goes back to the system until then."""
        ...

    def clock(self) -> Clock:
        """A clock of the work that is launched; the caller closes it before the backend."""
        ...


class Launch(Protocol):
    """A graph with every buffer bound. Calling it starts the work, in order; see `synchronize`."""

    def __call__(self) -> None: ...


class Session(Protocol):
    """A loaded graph."""

    def bind(self, inputs: Arrays, outputs: Arrays) -> Launch:
        """Bind buffers by name once; they must outlive the launch.

        All inputs of the graph are needed; outputs that are left out go nowhere.
        """
        ...

    def close(self) -> None: ...


class Backend(Memory, Protocol):
    """An inference library, set up."""

    @property
    def name(self) -> str: ...

    def open(self, graph: GraphFile) -> Session:
        """Load the graph that this ONNX file describes; `graph.ref` says which one of a bundle's it
        is: name, kind, scale and precision.

        Raises BackendError, and BundleError where the file is not what it should be.
        """
        ...

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        """Called once, when everything is bound, with the launches in the order of a generation.

        What comes back is called instead: the place to record CUDA graphs.
        """
        ...

    def describe(self) -> dict[str, str]:
        """Versions and settings, for a person who reads a benchmark: text, not data."""
        ...

    def close(self) -> None:
        """Release sessions and memory; safe to call twice."""
        ...
