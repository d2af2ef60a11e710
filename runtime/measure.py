"""How long images and launches take.

A `Clock` is handed to a `ClockedBackend`, which marks moments between the launches of a loop: CUDA
events where a GPU works on its own, the host's clock where the launch is the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from var_deploy.bundle_files import GraphFile
from var_deploy.graph_refs import generation_graphs
from var_deploy.manifest import Manifest
from var_deploy.runtime.cuda import call, load_api
from var_deploy.runtime.protocol import Array, Backend, Launch, Session, Shared


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Seconds that one thing took, repeated `count` times."""

    median: float
    p10: float
    p95: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        low, middle, high = np.percentile(seconds, [10, 50, 95])
        return cls(median=float(middle), p10=float(low), p95=float(high), count=len(seconds))

    def to_json(self) -> dict[str, float]:
        """In milliseconds."""
        return {
            "median_ms": round(self.median * 1e3, 5),
            "p10_ms": round(self.p10 * 1e3, 5),
            "p95_ms": round(self.p95 * 1e3, 5),
            "count": self.count,
        }


class Clock(Protocol):
    """Marks moments in the order of the work.

    Attributes:
        each: mark after every launch, not only after the last.
        source: what is read, for the report.
    """

    each: bool
    source: str

    def mark(self) -> None: ...

    def laps(self) -> list[float]:
        """Seconds between the marks since the last call; waits for the work."""
        ...

    def close(self) -> None: ...


class WallClock:
    """The host's clock; what was launched is waited for at every mark."""

    source = "wall clock"

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.each = False
        self._synchronize, self._moments = synchronize, list[float]()

    def mark(self) -> None:
        self._synchronize()
        self._moments.append(time.perf_counter())

    def laps(self) -> list[float]:
        moments, self._moments = self._moments, []
        return [after - before for before, after in pairwise(moments)]

    def close(self) -> None:
        pass


class CudaClock:
    """CUDA events on the stream of the launches: the device notes the time, nobody waits.

    Args:
        stream: handle of the stream.
        api: `cuda.bindings.runtime` or what stands for it; None imports it.
    """

    source = "CUDA events"

    def __init__(self, stream: int, api: Any = None) -> None:
        self.each = False
        self._api, self._stream = api or load_api(), stream
        self._events: list[Any] = []
        self._used = 0

    def mark(self) -> None:
        if self._used == len(self._events):
            self._events.append(call(self._api, "cudaEventCreate"))
        call(self._api, "cudaEventRecord", self._events[self._used], self._stream)
        self._used += 1

    def laps(self) -> list[float]:
        events, self._used = self._events[: self._used], 0
        if not events:
            return []
        call(self._api, "cudaEventSynchronize", events[-1])
        pairs = pairwise(events)
        return [1e-3 * float(call(self._api, "cudaEventElapsedTime", *pair)) for pair in pairs]

    def close(self) -> None:
        while self._events:
            call(self._api, "cudaEventDestroy", self._events.pop())


class ClockedBackend:
    """A backend whose launches are clocked; all else is left to it. Closed with it.

    Args:
        gaps: where every launch is marked, mark its start as well: every second lap is then what
            lies between two launches.
    """

    def __init__(self, backend: Backend, clock: Clock, *, gaps: bool = False) -> None:
        self._backend, self._clock, self._gaps = backend, clock, gaps

    @property
    def name(self) -> str:
        return self._backend.name

    def allocate(self, size: int) -> Array:
        return self._backend.allocate(size)

    def share(self, size: int) -> Shared:
        return self._backend.share(size)

    def synchronize(self) -> None:
        self._backend.synchronize()

    def forget(self, array: Array) -> None:
        self._backend.forget(array)

    def open(self, graph: GraphFile) -> Session:
        return self._backend.open(graph)

    def finish(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        ready = self._backend.finish(launches)
        last = len(ready) - 1
        return [self._clocked(launch, n == 0, n == last) for n, launch in enumerate(ready)]

    def describe(self) -> dict[str, str]:
        return self._backend.describe()

    def close(self) -> None:
        self._backend.close()

    def _clocked(self, launch: Launch, first: bool, last: bool) -> Launch:
        def run() -> None:
            if first or (self._gaps and self._clock.each):
                self._clock.mark()
            launch()
            if last or self._clock.each:
                self._clock.mark()

        return run


def add_launches(laps: Sequence[float], launches: Sequence[str]) -> dict[str, float]:
    """Seconds by launch, those of several generations added up; nothing where a mark is missing.

    `laps` are those of a `ClockedBackend` with `gaps` whose clock marks each launch.
    """
    seconds, count = laps[::2], len(launches)  # the others lie between two launches
    if not seconds or len(seconds) % count:
        return {}
    return {name: sum(seconds[n::count]) for n, name in enumerate(launches)}


def launch_names(manifest: Manifest) -> list[str]:
    """The launches of a generation, in order; `step` goes by the names of the static graphs."""
    return [graph.name for graph in generation_graphs(manifest.model, "per-scale")]
