"""Closed-loop load on services: N clients, each of which asks again once it was answered.

Services and numbers of clients take turns, round after round, so that a slow minute of the machine
hits all alike. Every image of a run has a seed of its own.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from var_deploy import __version__
from var_deploy.bench.service import Connection, Question, Service
from var_deploy.runtime.measure import LatencyStats

SCHEMA_VERSION = 1
EACH = 4  # images that a client asks for in a round

Progress = Callable[[str, float], object]


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """`concurrency`: numbers of clients; `repeat` rounds count, `warm_up` before them do not."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    repeat: int = 10
    warm_up: int = 2


@dataclass(kw_only=True)
class Level:
    """A service under a number of clients; filled while the run goes on.

    Attributes:
        latencies: seconds from a question to the last byte of its answer.
        rates: images a second of each round.
    """

    clients: int
    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images a second of the median round."""
        return statistics.median(self.rates)

    @property
    def latency(self) -> LatencyStats:
        return LatencyStats.of(self.latencies)

    def to_json(self) -> dict[str, Any]:
        return {
            "concurrency": self.clients,
            "images": len(self.latencies),
            "images_per_second": round(self.rate, 4),
            "latency": self.latency.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class ServiceResult:
    """What was found of a service."""

    service: Service
    levels: Sequence[Level]

    def to_json(self) -> dict[str, Any]:
        return {
            "url": self.service.url,
            "kind": self.service.kind,
            "about": dict(self.service.about),
            "levels": [level.to_json() for level in self.levels],
        }


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    settings: LoadSettings
    date: str
    results: Sequence[ServiceResult]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "var_deploy": __version__,
            "date": self.date,
            "settings": {**vars(self.settings), "images_a_client": EACH},
            "services": [result.to_json() for result in self.results],
        }


def load_services(
    services: Sequence[Service],
    settings: LoadSettings,
    progress: Progress = lambda message, fraction: None,
) -> LoadReport:
    """Put load on the services in turn.

    Raises BackendError at the first answer that is no image.
    """
    results = [
        ServiceResult(service=service, levels=[Level(clients=n) for n in settings.concurrency])
        for service in services
    ]
    seeds = itertools.count()
    turns = [(result.service, level) for result in results for level in result.levels]
    rounds = range(-settings.warm_up, settings.repeat)
    for number, (round_, (service, level)) in enumerate(itertools.product(rounds, turns)):
        name = f"round {round_ + 1} of {settings.repeat}" if round_ >= 0 else "warming up"
        progress(f"{name}: {level.clients} at {service.url}", number / len(turns) / len(rounds))
        latencies, seconds = ask_together(service, level.clients, seeds)
        if round_ >= 0:
            level.latencies += latencies
            level.rates.append(len(latencies) / seconds)
    return LoadReport(
        settings=settings,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        results=results,
    )


def ask_together(service: Service, clients: int, seeds: Iterator[int]) -> tuple[list[float], float]:
    """Seconds of each of EACH answers a client, and seconds of all of them together.

    Raises BackendError at the first answer that is no image.
    """
    asked = [[service.question(next(seeds)) for _ in range(EACH)] for _ in range(clients)]
    together, stopped = threading.Barrier(clients + 1), threading.Event()

    def client(questions: Sequence[Question]) -> list[float]:
        latencies = []
        with contextlib.closing(Connection(service.address)) as connection:
            try:
                connection.open()
            finally:
                together.wait()
            for question in questions:
                if stopped.is_set():
                    break
                started = time.perf_counter()
                connection.ask(question)
                latencies.append(time.perf_counter() - started)
        return latencies

    with ThreadPoolExecutor(clients) as threads:
        working = [threads.submit(client, questions) for questions in asked]
        try:
            together.wait()
            started = time.perf_counter()
            latencies = [seconds for one in as_completed(working) for seconds in one.result()]
        finally:
            stopped.set()  # where one failed, or Ctrl-C was pressed, the others ask no more
    return latencies, time.perf_counter() - started
