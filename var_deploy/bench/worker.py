"""Worker programs of `bench`: each runs one generation per request.

A worker is a process of its own, so that runtimes share no threads, memory or environment. It
writes lines of JSON to stdout: after loading `{"ready": {...}}` or `{"problem": "one line"}`; then,
for each line "generate" on stdin, `{"seconds": ..., "launches": {...}}` or a problem. It ends at
the end of stdin. A worker does not warm up by itself: its first generation is requested like any
other, and shows how long a start takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

from var_deploy.errors import VarDeployError, one_line

GENERATE = "generate"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The time of one generation of N images, from labels or text features to uint8 images.

    Attributes:
        launches: name of `launch_names` → seconds of the launch; empty where the runtime does not
            tell them apart.
    """

    seconds: float
    launches: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class About:
    """A worker's description of itself, sent when it is ready.

    Attributes:
        settings: versions, threads, precision and so on, as text for the report.
        graphs: precision of the bundle's graphs that it runs; "" where it runs none of them.
        backend: its backend, as `RuntimeConfig` names it; "" for other runtimes.
        threads: CPU threads; 0 where unknown.
        reason: why its backend was selected; "" where no backend was passed over.
        loading: parts of loading → seconds; empty where the runtime does not tell them apart.
        work: of a worker that runs other graphs than those of a generation: "weights", bytes of
            its weights; "compute" and "full", its operations in the precision of the graphs and in
            fp32.
    """

    settings: Mapping[str, str]
    graphs: str = ""
    backend: str = ""
    threads: int = 0
    reason: str = ""
    loading: Mapping[str, float] = field(default_factory=dict)
    work: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, data: object) -> About | None:
        """Parse the JSON value of "ready"; None where it is not a description."""
        if not isinstance(data, dict) or not isinstance(data.get("settings"), dict):
            return None
        texts = {name: str(data.get(name, "")) for name in ("graphs", "backend", "reason")}
        threads = data.get("threads")
        loading, work = data.get("loading"), data.get("work")
        return cls(
            settings={str(key): str(value) for key, value in data["settings"].items()},
            threads=threads if isinstance(threads, int) else 0,
            loading={
                str(part): float(seconds)
                for part, seconds in (loading if isinstance(loading, dict) else {}).items()
                if isinstance(seconds, (int, float))
            },
            work={
                str(name): amount
                for name, amount in (work if isinstance(work, dict) else {}).items()
                if isinstance(amount, int)
            },
            **texts,
        )

    def to_json(self) -> dict[str, str]:
        """The settings and the reason, as they appear in a report."""
        return {**self.settings, **({"chosen because": self.reason} if self.reason else {})}


class Worker(Protocol):
    """A runtime that is loaded and ready to generate N images."""

    def describe(self) -> About:
        """Settings and versions of the worker."""
        ...

    def generate(self) -> Sample:
        """Generate N images, and measure the time."""
        ...

    def close(self) -> None: ...


def serve(
    make: Callable[[], Worker],
    requests: TextIO | None = None,
    replies: TextIO | None = None,
) -> int:
    """Run a worker's main loop: answer requests until their end; returns the exit code.

    `make` imports the runtime and loads the bundle. Without `replies`, replies go to the original
    stdout, and all other output to stdout, of Python or of a library, is redirected to stderr.
    """
    out = _take_stdout() if replies is None else replies
    requests = requests or sys.stdin
    try:
        worker = make()
    except (Exception, SystemExit) as error:
        _reply(out, {"problem": _problem(error)})
        return 1
    try:
        _reply(out, {"ready": dataclasses.asdict(worker.describe())})
        for line in requests:
            if line.strip() != GENERATE:
                _reply(out, {"problem": f"unknown request {line.strip()[:40]!r}"})
                continue
            try:
                sample = worker.generate()
            except Exception as error:
                _reply(out, {"problem": _problem(error)})
                continue
            _reply(out, {"seconds": sample.seconds, "launches": dict(sample.launches)})
    finally:
        worker.close()
    return 0


def worker_parser(module: str, *, threads: str) -> argparse.ArgumentParser:
    """Argument parser with the options of all workers. `threads`: help text for 0 threads."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="images of one generation")
    parser.add_argument("--threads", type=int, default=0, help=f"0: {threads}")
    return parser


def _take_stdout() -> TextIO:
    """Return a stream to the current stdout, and redirect descriptor 1 to stderr."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _reply(out: TextIO, message: Mapping[str, object]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _problem(error: BaseException) -> str:
    """The message of an error; for errors of other packages with the name of its type."""
    said, kind = one_line(error), type(error).__name__
    return said if isinstance(error, VarDeployError) or said == kind else f"{kind}: {said}"
