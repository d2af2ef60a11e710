"""Runs damaged inputs through the product, one after another in a child process, and counts.

Every case must be accepted or refused in one line, within its time and memory. A test makes the
cases from a seed, so that a number names a case; `make fuzz` makes more of them with
VAR_DEPLOY_FUZZ=20.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from var_deploy.errors import VarDeployError

LONGEST_REFUSAL = 1000  # characters: a refusal that repeats its whole input is none
START_SECONDS = 120  # for a child's imports and its first, valid case
MEGABYTE = 1 << 20


def scaled(count: int) -> int:
    """`count` cases in CI; VAR_DEPLOY_FUZZ times as many where it is set."""
    return count * int(os.environ.get("VAR_DEPLOY_FUZZ", "1"))


@dataclass
class Counts:
    """What became of the cases of one run; the lists must be empty."""

    name: str
    accepted: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)  # AssertionError, refusal not in one line, noise
    crashed: list[str] = field(default_factory=list)  # another exception, or the process died
    hung: list[str] = field(default_factory=list)
    over_memory: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [*self.wrong, *self.crashed, *self.hung, *self.over_memory]

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.failures)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.tried} tried, {self.accepted} accepted, {self.refused} refused in "
            f"one line, {len(self.wrong)} wrong, {len(self.crashed)} crashed, {len(self.hung)} "
            f"hung, {len(self.over_memory)} over memory"
        )


def run_cases(
    name: str,
    cases: Iterable[Any],
    attempt: Callable[[Any], object],
    seconds: float,
    megabytes: float,
    valid: Any = None,
) -> Counts:
    """Call `attempt(case)` for every case in a child process and print and return the counts.

    Args:
        cases: picklable values.
        attempt: a function of a module that can be imported by name (not of a test file), or a
            `functools.partial` of one. Returning accepts the case, a VarDeployError refuses it;
            AssertionError is for what the attempt itself finds to be wrong, such as a half-written
            file. Whatever it prints, from C code as well, counts as wrong.
        seconds: for one case. Generous limits only: other work runs on the same machine.
        megabytes: that one case may add to the memory of the child.
        valid: a case that must be accepted. Every child runs it first, so that imports and caches
            count towards no other case.
    """
    counts, child = Counts(name), None
    try:
        for number, case in enumerate(cases):
            child = child or _Child(attempt, valid)
            kind, words = child.run(case, seconds, megabytes)
            if kind in ("accepted", "refused"):
                setattr(counts, kind, getattr(counts, kind) + 1)
                continue
            getattr(counts, kind).append(f"{name} {number}: {words} [{repr(case)[:200]}]")
            if kind in ("hung", "crashed", "over_memory"):  # the child may be gone or swollen
                child.stop()
                child = None
    finally:
        if child is not None:
            child.stop()
    print(counts)
    return counts


class _Child:
    """The process that runs the attempts."""

    def __init__(self, attempt: Callable[[Any], object], valid: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, attempt), daemon=True)
        self._process.start()
        there.close()
        if valid is not None:
            kind, words = self.run(valid, START_SECONDS, 1 << 20)
            if kind != "accepted":
                self.stop()
                raise AssertionError(f"the valid case was not accepted: {kind}: {words}")

    def run(self, case: Any, seconds: float, megabytes: float) -> tuple[str, str]:
        try:
            self._here.send((case, megabytes))
            if not self._here.poll(seconds):
                return "hung", f"not done after {seconds} s"
            kind, words = self._here.recv()
        except (EOFError, OSError):
            self._process.join(10)
            return "crashed", f"the process ended with {self._process.exitcode}"
        return str(kind), str(words)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._here.close()


def _serve(there: Connection, attempt: Callable[[Any], object]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
        while True:
            try:
                case, megabytes = there.recv()
            except EOFError:
                return
            there.send(_verdict(attempt, case, megabytes, noise.fileno()))


def _verdict(
    attempt: Callable[[Any], object], case: Any, megabytes: float, noise: int
) -> tuple[str, str]:
    os.ftruncate(noise, 0)
    os.lseek(noise, 0, os.SEEK_SET)
    # resets the peak, so that it is this case's
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    # what grows without end shall not take the machine with it
    limit = int(_status("VmData") + 4 * megabytes) * MEGABYTE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    kind, words = _outcome(attempt, case)
    grown = _status("VmHWM") - before
    if grown > megabytes:
        return "over_memory", f"{grown:.0f} MB, at most {megabytes:.0f}; then {kind}: {words[:300]}"
    if kind in ("accepted", "refused") and os.fstat(noise).st_size:
        printed = os.pread(noise, 300, 0).decode(errors="replace")
        return "wrong", f"printed {printed!r}"
    return kind, words


def _outcome(attempt: Callable[[Any], object], case: Any) -> tuple[str, str]:
    try:
        attempt(case)
    except VarDeployError as error:
        words = str(error)
        if not words or not words.isprintable() or len(words) > LONGEST_REFUSAL:
            return "wrong", f"refused, but not in one short line: {words[:300]!r}"
        return "refused", words
    except AssertionError as error:
        return "wrong", " ".join(str(error).split())[:300]
    except BaseException:
        return "crashed", " | ".join(traceback.format_exc().splitlines()[-4:])[-700:]
    return "accepted", ""


def _status(field: str) -> float:
    """A line of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) / 1024
    raise KeyError(field)
