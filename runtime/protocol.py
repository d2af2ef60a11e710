"""What the scale loop asks of an inference library: open a graph, bind buffers, launch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

Buffers = Mapping[str, NDArray[Any]]


class Launch(Protocol):
    """A graph with every buffer bound; calling it computes the outputs in place."""

    def __call__(self) -> None: ...


class Session(Protocol):
    """A loaded graph."""

    def bind(self, inputs: Buffers, outputs: Buffers) -> Launch:
        """Bind buffers by name once; they stay the caller's and must outlive the launch.

        All inputs of the graph are needed; outputs that are left out are not copied anywhere.
        """
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """An inference library, set up."""

    @property
    def name(self) -> str: ...

    def open(self, graph: Path) -> Session:
        """Load an ONNX file. Raises BackendError."""
        ...

    def describe(self) -> dict[str, str]:
        """Versions and settings, for a person who reads a benchmark."""
        ...
