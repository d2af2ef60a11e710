"""Timing of generations and of single launches.

A backend's `Clock` marks moments between the launches of a loop: with CUDA events on a GPU, which
runs asynchronously, and with the host's clock on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from var_deploy.bundle.graph_refs import generation_graphs
from var_deploy.manifest import Manifest
from var_deploy.runtime.backends.protocol import Clock, Launch


@dataclass(frozen=True, kw_only=True)
class LatencyStats:
    """Statistics of `count` measured times: median, 10th and 95th percentile, in seconds."""

    median: float
    p10: float
    p95: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> LatencyStats:
        """Compute the statistics of measured times."""
        low, middle, high = np.percentile(seconds, [10, 50, 95])
        return cls(median=float(middle), p10=float(low), p95=float(high), count=len(seconds))

    def to_json(self) -> dict[str, float]:
        """The statistics in milliseconds."""
        return {
            "median_ms": round(self.median * 1e3, 5),
            "p10_ms": round(self.p10 * 1e3, 5),
            "p95_ms": round(self.p95 * 1e3, 5),
            "count": self.count,
        }


class WallClock:
    """A `Clock` that reads the host's clock; every mark waits for the launches before it."""

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


def clocked(launch: Launch, clock: Clock, *, first: bool = False, last: bool = False) -> Launch:
    """Wrap a launch so that it marks the clock.

    With `clock.each` the start and the end of every launch are marked; without it only the start of
    the first launch of a generation and the end of the last one.
    """

    def run() -> None:
        if first or clock.each:
            clock.mark()
        launch()
        if last or clock.each:
            clock.mark()

    return run


def launch_seconds(laps: Sequence[float]) -> list[float]:
    """The seconds of the launches, out of the laps of a clock that marks each launch.

    Every second lap lies between two launches and is left out.
    """
    return list(laps[::2])


def add_launches(laps: Sequence[float], launches: Sequence[str]) -> dict[str, float]:
    """Seconds of each launch by name, summed over generations; {} where a mark is missing.

    `laps` come from a clock that marks each launch.
    """
    seconds, count = launch_seconds(laps), len(launches)
    if not seconds or len(seconds) % count:
        return {}
    return {name: sum(seconds[n::count]) for n, name in enumerate(launches)}


def launch_names(manifest: Manifest) -> list[str]:
    """Names of the launches of a generation, in order; `step` counts as the static graphs."""
    graphs = generation_graphs(manifest.model, "per-scale", guidance=manifest.guidance)
    return [graph.name for graph in graphs]
