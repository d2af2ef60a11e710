"""Closed-loop load test of services: N clients, each with one request at a time.

Services and numbers of clients take turns in interleaved rounds, so that a slow minute of the
machine affects all alike. Every image of a run has its own seed.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from var_deploy import __version__
from var_deploy.bench.service import Connection, Question, Service
from var_deploy.progress import Progress
from var_deploy.runtime.measure import LatencyStats

SCHEMA_VERSION = 1
EACH = 4  # images per client and round


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """`concurrency`: numbers of clients; `repeat`: counted rounds; `warm_up`: rounds before."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    repeat: int = 10
    warm_up: int = 2


@dataclass(kw_only=True)
class Level:
    """Results of a service with a number of clients; filled during the run.

    Attributes:
        latencies: seconds from a request to the last byte of its response.
        rates: images per second of each round.
    """

    clients: int
    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images per second, the median over the rounds."""
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
    """The results of one service for all numbers of clients."""

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
    """The report of one load test, with all services."""

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
    """Run the load test on the services in turn.

    Raises BackendError at the first response that is not an image.
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
    """Run one round: the latency of each request, EACH per client, and the seconds of the round.

    Raises BackendError at the first response that is not an image.
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
            stopped.set()  # after a failure or Ctrl-C, the other clients send no more requests
    return latencies, time.perf_counter() - started
