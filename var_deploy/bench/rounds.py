"""Measures workers: first the memory of each alone, then the times of all in interleaved rounds.

Memory is measured separately, since PSS divides pages among processes, and reading it would disturb
timings. Rounds are interleaved, so that a slow minute of the machine affects all workers alike; a
worker that waits uses no processor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from var_deploy.bench.power import Energy, Meters, measure
from var_deploy.bench.process import MemoryWatch, WorkerProcess
from var_deploy.bench.report import Result
from var_deploy.bench.worker import About, Sample
from var_deploy.errors import BackendError
from var_deploy.progress import Progress

ALONE = 2  # generations while memory is watched
# Seconds between two workers. Threads of a library spin for a moment after their work and would
# take processors from the next worker.
PAUSE = 0.05
ENERGY_SECONDS = 5.0
SETTLE_SECONDS = 1.5  # before energy is measured: NVIDIA cards report the mean of the last second
PROC = Path("/proc")
FIRST_IMAGE = "first image"
Start = Callable[[Sequence[str]], WorkerProcess]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A worker to run: its name and command, or the problem why it cannot run."""

    name: str
    ours: bool
    command: Sequence[str] = ()
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Settings of a comparison.

    Attributes:
        images: images per generation.
        warm_up, repeat: rounds that are not counted, then rounds that are.
        meters: energy meters, read after the rounds.
        proc: folder /proc, from which memory is read.
        start: starts a worker's process.
    """

    images: int
    warm_up: int
    repeat: int
    meters: Meters = field(default_factory=Meters)
    proc: Path = PROC
    start: Start = WorkerProcess


@dataclass(frozen=True, kw_only=True)
class Rated:
    """Result of the process that measures the machine's rates: samples, or the problem."""

    about: About | None = None
    samples: tuple[Sample, ...] = ()
    problem: str = ""


def cold_parts(process: WorkerProcess, about: About) -> dict[str, float]:
    """The parts of a cold start → seconds, in order; their sum is `process.cold`.

    "imports" is all time until the worker is ready except the parts of loading that it tells: the
    start of the interpreter, the imports of this package and of the inference library. Empty where
    the worker does not tell the parts of loading.
    """
    if process.loaded is None or process.cold is None or not about.loading:
        return {}
    imports = process.loaded - sum(about.loading.values())
    return {"imports": imports, **about.loading, FIRST_IMAGE: process.cold - process.loaded}


class Comparison:
    """Runs workers in turn, and in between a program that measures the machine's rates.

    Args:
        entries: workers, in the order of their turns.
        rates: command of the program that measures rates.
    """

    def __init__(
        self, entries: Sequence[Entry], rates: Sequence[str], rounds: Rounds, progress: Progress
    ) -> None:
        self.results = [Result(name=e.name, ours=e.ours, problem=e.problem) for e in entries]
        self.rated = Rated()
        self._commands = {e.name: e.command for e in entries}
        self._rates, self._rounds, self._progress = rates, rounds, progress
        # loading twice takes about as long as a few generations
        self._steps = len(entries) * (ALONE + 6 + rounds.warm_up + rounds.repeat)
        self._done = 0

    def run(self) -> None:
        """Fill `results` and `rated`. An error of a worker is recorded and ends that worker."""
        for result in self._running():
            with self._noting(result):
                self._alone(result)
        with contextlib.ExitStack() as stack:
            clock = self._start_rates(stack)
            started: dict[str, WorkerProcess] = {}
            for result in self._running():
                with self._noting(result):
                    started[result.name] = self._start(result, stack)
            for number in range(-self._rounds.warm_up, self._rounds.repeat):
                self._round(number, clock, started)
            for result in self._running():
                with self._noting(result):
                    self._energy(result, started[result.name])

    def _running(self) -> list[Result]:
        return [result for result in self.results if not result.problem]

    @contextlib.contextmanager
    def _noting(self, result: Result) -> Iterator[None]:
        try:
            yield
        except BackendError as error:
            result.problem = str(error)

    def _told(self, message: str, steps: int = 1) -> None:
        self._progress(message, min(self._done / self._steps, 1.0))
        self._done += steps

    def _alone(self, result: Result) -> None:
        """Measure the peak PSS of a worker, while no other process maps its files."""
        self._told(f"{result.name}: memory", ALONE + 3)
        rounds = self._rounds
        with (
            rounds.start(self._commands[result.name]) as process,
            MemoryWatch(process.pid, rounds.proc) as watch,
        ):
            result.about = process.ready()
            for _ in range(ALONE):
                process.generate()
        result.peak, result.peak_problem = watch.peak, watch.problem

    def _start(self, result: Result, stack: contextlib.ExitStack) -> WorkerProcess:
        self._told(f"{result.name}: first image", 3)
        process = stack.enter_context(self._rounds.start(self._commands[result.name]))
        about = process.ready()
        process.generate()
        result.cold, result.cold_parts = process.cold, cold_parts(process, about)
        return process

    def _start_rates(self, stack: contextlib.ExitStack) -> WorkerProcess | None:
        try:
            process = stack.enter_context(self._rounds.start(self._rates))
            self.rated = Rated(about=process.ready())
            process.generate()
        except BackendError as error:
            self.rated = Rated(problem=str(error))
            return None
        return process

    def _round(
        self, number: int, clock: WorkerProcess | None, started: dict[str, WorkerProcess]
    ) -> None:
        counts = number >= 0
        name = f"round {number + 1} of {self._rounds.repeat}" if counts else "warming up"
        if counts and clock and not self.rated.problem:
            time.sleep(PAUSE)
            self._rate(clock)
        for result in self._running():
            self._told(f"{name}: {result.name}")
            time.sleep(PAUSE)
            with self._noting(result):
                sample = started[result.name].generate()
                if counts:
                    result.samples.append(sample)

    def _rate(self, clock: WorkerProcess) -> None:
        rated = self.rated
        try:
            self.rated = dataclasses.replace(rated, samples=(*rated.samples, clock.generate()))
        except BackendError as error:
            self.rated = Rated(problem=str(error))

    def _energy(self, result: Result, process: WorkerProcess) -> None:
        """Measure the energy of a worker that generates without pauses for some seconds."""
        if not self._rounds.meters.found:
            result.energy = Energy(problem=self._rounds.meters.problem)
            return
        self._told(f"{result.name}: energy", 0)

        def generate_for(seconds: float) -> int:
            count, until = 0, time.perf_counter() + seconds
            while not count or time.perf_counter() < until:
                process.generate()
                count += 1
            return count * self._rounds.images

        generate_for(SETTLE_SECONDS)
        result.energy = measure(self._rounds.meters, partial(generate_for, ENERGY_SECONDS))
