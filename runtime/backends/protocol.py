"""The interface between the scale loop and an inference library: memory, sessions, launches.

A backend owns memory (the host's or a device's) and opens graphs that read and write it. The loop
uses only addresses and shapes, so one loop serves CPUs and GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from var_deploy.bundle.files import GraphFile

ALIGNMENT = 256  # bytes, required by TensorRT; more than any vector unit needs


@dataclass(frozen=True, eq=False)
class Array:
    """A typed view of a backend's memory, C-contiguous.

    Attributes:
        address: address of the first byte in the backend's memory.
        owner: an object that keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = field(repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Array:
        """A view of rows [start, stop) along the first axis."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return Array(self.address + start * row, shape, self.dtype, self.owner)


Arrays = Mapping[str, Array]


class Shared(Protocol):
    """Memory that exists on the host (`host`) and in the backend's memory (`address`).

    On a CPU both are the same bytes, and `upload` and `download` do nothing.
    """

    @property
    def host(self) -> NDArray[np.uint8]:
        """The bytes on the host, uint8 [size]."""
        ...

    @property
    def address(self) -> int:
        """Address of the first byte in the backend's memory."""
        ...

    def upload(self) -> None:
        """Copy host → backend, in order with the launches."""
        ...

    def download(self) -> None:
        """Copy backend → host; `host` is valid after `Memory.synchronize`."""
        ...


class Clock(Protocol):
    """Marks moments between launches, in order with them; see `ScaleLoop.start_clock`.

    Attributes:
        each: mark the start and the end of every launch, not only of a generation.
        source: name of the time source, for a report.
    """

    each: bool
    source: str

    def mark(self) -> None:
        """Mark the current moment, after the launches so far."""
        ...

    def laps(self) -> list[float]:
        """Seconds between the marks since the last call; waits for the launches."""
        ...

    def close(self) -> None: ...


class Memory(Protocol):
    """Allocates memory, zeroed and aligned to 256 bytes, that lives until the backend is closed."""

    def allocate(self, size: int) -> Array:
        """Allocate uint8 [size] that only graphs read and write. Raises BackendError if memory is
        short."""
        ...

    def share(self, size: int) -> Shared:
        """Allocate `size` bytes that the host reads or writes too."""
        ...

    def synchronize(self) -> None:
        """Wait until all launches and copies so far are done."""
        ...

    def discard(self, array: Array) -> None:
        """Discard the contents of `array`: the caller writes to it before reading it again.

        A backend on the host returns the memory to the system; its contents may become zeros.
        """
        ...

    def clock(self) -> Clock:
        """A new clock of the launches; the caller closes it before the backend."""
        ...


class Launch(Protocol):
    """A graph with all buffers bound. A call starts it, in order; `Memory.synchronize` waits."""

    def __call__(self) -> None: ...


class Session(Protocol):
    """A loaded graph."""

    def bind(self, inputs: Arrays, outputs: Arrays) -> Launch:
        """Bind buffers by tensor name; they must outlive the returned launch.

        All inputs of the graph must be given; outputs that are left out are not stored.
        """
        ...

    def close(self) -> None: ...


class Backend(Memory, Protocol):
    """An inference library, ready to open graphs."""

    @property
    def name(self) -> str:
        """The backend's name, as in `RuntimeConfig.backend`."""
        ...

    def open(self, graph: GraphFile) -> Session:
        """Load the graph of an ONNX file; `graph.ref` has its name, kind, scale and precision.

        Raises BundleError where the file is damaged, BackendError where the library refuses it. A
        backend may load in a thread of its own; then `Session.bind` waits, and raises the errors.
        """
        ...

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        """Prepare the launches of a generation, given in order; called once, after binding.

        The returned launches are called instead. A backend may run every launch here, for example
        to record CUDA graphs.
        """
        ...

    def describe(self) -> dict[str, str]:
        """Versions and settings as text, for the reader of a benchmark; not meant to be parsed."""
        ...

    def close(self) -> None:
        """Release sessions and memory; safe to call twice."""
        ...
