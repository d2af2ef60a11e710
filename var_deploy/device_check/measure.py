"""Measures the time of generations and launches by repetition."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy.runtime.backends.protocol import Clock
from var_deploy.runtime.measure import LatencyStats, launch_seconds

BUDGET = 20.0  # seconds for one series of repetitions
WARM_UP = 0.1  # share of the budget for warm-up, in which clocks rise and caches fill
FEWEST, MOST, FEWEST_WARM_UPS = 5, 200, 2


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time statistics of one generation of B images.

    Attributes:
        image: from the start of the first launch to the end of the last.
        call: the whole `ScaleLoop.run` on the host's clock, copies and checks included.
        launches: launch → statistics, in order; empty where marks are missing.
    """

    image: LatencyStats
    call: LatencyStats
    launches: Mapping[str, LatencyStats]

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.image.to_json(),
            "call": self.call.to_json(),
            "launches": {name: spread.to_json() for name, spread in self.launches.items()},
        }


def time_images(
    run: Callable[[], object], clock: Clock, launches: Sequence[str], budget: float = BUDGET
) -> Latency:
    """Time `run`, a generation of the loop of `clock`.

    It is timed first as a whole, then launch by launch, each for about `budget` seconds.
    """
    clock.each = False
    clock.laps()  # drop earlier marks
    _repeat(run, FEWEST_WARM_UPS, WARM_UP * budget, clock.laps, most=None)
    images: list[float] = []
    calls = _repeat(run, FEWEST, budget, lambda: images.append(sum(clock.laps())))
    clock.each = True
    parts: list[list[float]] = []
    _repeat(run, FEWEST, budget, lambda: parts.append(launch_seconds(clock.laps())))
    clock.each = False
    fit = all(len(laps) == len(launches) for laps in parts)
    columns = zip(launches, zip(*parts, strict=True), strict=True) if fit else ()
    return Latency(
        image=LatencyStats.of(images),
        call=LatencyStats.of(calls),
        launches={name: LatencyStats.of(laps) for name, laps in columns},
    )


def _repeat(
    run: Callable[[], object],
    fewest: int,
    budget: float,
    after: Callable[[], object],
    most: int | None = MOST,
) -> list[float]:
    """Seconds of each run: at least `fewest` runs, at most `most`, within the budget."""
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
