"""What `bench` compares: programs that make one generation whenever they are asked to.

A worker is a process of its own, so that no library shares threads, memory or environment with
another, and speaks one line of JSON at a time: first, once it is loaded, `{"ready": {...}}` or
`{"problem": "one line"}`; then, for each line "generate" that it reads, `{"seconds": ...,
"launches": {...}}` or a problem. It ends when its input does. Warming up is not its business: the
first generation is asked for like any other, and tells how long a start takes.
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
    """One generation as its user sees it: N images, everything included.

    Attributes:
        launches: seconds of each launch by the names of `launch_names`; empty where they cannot
            be told apart.
    """

    seconds: float
    launches: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class About:
    """What a worker says of itself.

    Attributes:
        settings: versions, threads, precision and so on, for a person who reads the report.
        graphs: precision of the bundle's weights that it runs; "" where it runs no such.
        backend: what runs them, as `RuntimeConfig` names it; "" for what is none of those.
        threads: of the CPU; 0 where it does not tell.
        reason: why its backend was chosen; "" where nothing was passed over.
    """

    settings: Mapping[str, str]
    graphs: str = ""
    backend: str = ""
    threads: int = 0
    reason: str = ""

    @classmethod
    def read(cls, data: object) -> About | None:
        """Of the line that a worker writes; None where it is none."""
        if not isinstance(data, dict) or not isinstance(data.get("settings"), dict):
            return None
        texts = {name: str(data.get(name, "")) for name in ("graphs", "backend", "reason")}
        threads = data.get("threads")
        return cls(
            settings={str(key): str(value) for key, value in data["settings"].items()},
            threads=threads if isinstance(threads, int) else 0,
            **texts,
        )

    def to_json(self) -> dict[str, str]:
        """As a report holds it."""
        return {**self.settings, **({"chosen because": self.reason} if self.reason else {})}


class Worker(Protocol):
    """One way to make N images, loaded and ready."""

    def describe(self) -> About: ...

    def generate(self) -> Sample: ...

    def close(self) -> None: ...


def serve(
    make: Callable[[], Worker],
    requests: TextIO | None = None,
    replies: TextIO | None = None,
) -> int:
    """Answer requests until their end; the exit code.

    `make` imports and loads. Where `replies` is left out they go to what stdout was at the start,
    and whatever else is written to stdout, by Python or by a library, goes to stderr instead.
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
    """What every worker's command line takes. `threads`: what 0 of them means."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="images of one generation")
    parser.add_argument("--threads", type=int, default=0, help=f"0: {threads}")
    return parser


def _take_stdout() -> TextIO:
    """A stream to where stdout leads now; from here on descriptor 1 leads to stderr."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _reply(out: TextIO, message: Mapping[str, object]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _problem(error: BaseException) -> str:
    """Our own messages as they are; others with their kind, which often says more than they."""
    said, kind = one_line(error), type(error).__name__
    return said if isinstance(error, VarDeployError) or said == kind else f"{kind}: {said}"
