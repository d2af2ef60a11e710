"""How long images and launches take, and the least time that a device's rates allow.

A `Clock` is handed to a `ClockedBackend`, which marks moments between the launches of a loop: CUDA
events where a GPU works on its own, the host's clock where the launch is the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from var_deploy import names
from var_deploy.manifest import Manifest
from var_deploy.planning.costs import Workload
from var_deploy.planning.devices import Device
from var_deploy.planning.plan import launch_times
from var_deploy.runtime.cuda import call, load_api
from var_deploy.runtime.protocol import Array, Backend, Launch, Session, Shared

BUDGET = 20.0  # seconds for one kind of repetition
WARM_UP = 0.1  # share of it that is run before; clocks rise and caches fill meanwhile
FEWEST, MOST, FEWEST_WARM_UPS = 5, 200, 2


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


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One generation of B images.

    Attributes:
        image: from the start of the first launch to the end of the last.
        call: of the whole `ScaleLoop.run` as the host sees it, copies and checks included.
        launches: by name, in order; empty where they cannot be told apart.
    """

    image: Spread
    call: Spread
    launches: Mapping[str, Spread]

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.image.to_json(),
            "call": self.call.to_json(),
            "launches": {name: spread.to_json() for name, spread in self.launches.items()},
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
    """A backend whose launches are clocked; all else is left to it. Closed with it."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self._backend, self._clock = backend, clock

    @property
    def name(self) -> str:
        return self._backend.name

    def allocate(self, size: int) -> Array:
        return self._backend.allocate(size)

    def share(self, size: int) -> Shared:
        return self._backend.share(size)

    def synchronize(self) -> None:
        self._backend.synchronize()

    def open(self, graph: Path) -> Session:
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
            if first:
                self._clock.mark()
            launch()
            if last or self._clock.each:
                self._clock.mark()

        return run


def launch_names(manifest: Manifest) -> list[str]:
    """The launches of a generation, in order; `step` goes by the names of the static graphs."""
    spec = manifest.model
    condition = [names.CONDITION] if spec.transformer.conditional else []
    scales = [names.scale_graph(k) for k in range(spec.scales)]
    return [*condition, *scales, names.DECODER]


def time_images(
    run: Callable[[], object], clock: Clock, launches: Sequence[str], budget: float = BUDGET
) -> Latency:
    """Time `run`, a generation on a `ClockedBackend` with this clock: first as a whole, then
    launch by launch, each for about `budget` seconds."""
    clock.each = False
    clock.laps()  # what was marked before belongs to nobody
    _repeat(run, FEWEST_WARM_UPS, WARM_UP * budget, clock.laps, most=None)
    images: list[float] = []
    calls = _repeat(run, FEWEST, budget, lambda: images.append(sum(clock.laps())))
    clock.each = True
    parts: list[list[float]] = []
    _repeat(run, FEWEST, budget, lambda: parts.append(clock.laps()))
    clock.each = False
    fit = all(len(laps) == len(launches) for laps in parts)
    columns = zip(launches, zip(*parts, strict=True), strict=True) if fit else ()
    return Latency(
        image=Spread.of(images),
        call=Spread.of(calls),
        launches={name: Spread.of(laps) for name, laps in columns},
    )


def _repeat(
    run: Callable[[], object],
    fewest: int,
    budget: float,
    after: Callable[[], object],
    most: int | None = MOST,
) -> list[float]:
    """Seconds of each of at least `fewest` runs, as many as the budget allows up to `most`."""
    seconds: list[float] = []
    started = time.perf_counter()
    while most is None or len(seconds) < most:
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
        after()
        if len(seconds) >= fewest and time.perf_counter() - started > budget:
            break
    return seconds


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of one launch, twice: to move its bytes, and to do its operations."""

    name: str
    traffic: int
    operations: int
    moving: float
    computing: float

    @property
    def seconds(self) -> float:
        return max(self.moving, self.computing)


def floors(workload: Workload, device: Device) -> list[Floor]:
    """Floors of every launch of B images, as `plan` counts bytes and operations."""
    half = device.sm is None or workload.precision == "fp16"  # a CPU has one rate
    rate = device.compute_rate if half else device.full_rate
    return [
        Floor(
            name=work.name,
            traffic=work.traffic,
            operations=work.compute_operations + work.full_operations,
            moving=work.traffic / device.bandwidth,
            computing=work.compute_operations / rate + work.full_operations / device.full_rate,
        )
        for work in (launch.work for launch in launch_times(workload, device))
    ]


def reached(latency: Latency, least: Sequence[Floor]) -> dict[str, Any]:
    """What part of the measured times the floors are: 1 is the floor itself."""
    rows = []
    for floor in least:
        measured = latency.launches.get(floor.name)
        rows.append(
            {
                "launch": floor.name,
                "bytes": floor.traffic,
                "operations": floor.operations,
                "moving_ms": round(floor.moving * 1e3, 5),
                "computing_ms": round(floor.computing * 1e3, 5),
                "measured_ms": measured and round(measured.median * 1e3, 5),
                "reached": measured and round(floor.seconds / measured.median, 4),
            }
        )
    seconds = sum(floor.seconds for floor in least)
    return {
        "floor_ms": round(seconds * 1e3, 5),
        "measured_ms": round(latency.image.median * 1e3, 5),
        "reached": round(seconds / latency.image.median, 4),
        "launches": rows,
    }
