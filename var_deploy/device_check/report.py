"""The report of `device_check`: runs steps, also after a failed one, and writes one JSON file.

The file is written before and after every step: if the process dies, the report shows its last step
as "running". It contains no paths and no name of the machine.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from var_deploy import __version__
from var_deploy.errors import BackendError, VarDeployError, one_line
from var_deploy.files import whole_file
from var_deploy.host.terminal import is_terminal, visible

SCHEMA_VERSION = 1
State = Literal["running", "done", "failed", "not run"]
# absolute paths of two or more names; those in /proc and /etc are the same on every machine
PATH = re.compile(r"(?<![\w.~-])(?:~|[A-Za-z]:)?(?!/(?:proc|etc)/)(?:[/\\][^\s/\\:;,'\"()]+){2,}")
PAUSE = 0.1  # seconds


class NotRunError(Exception):
    """A step cannot run on this machine; the message says why, and how to change that."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a step.

    Attributes:
        result: JSON values.
        headline: a summary in a few words.
        problems: values beyond their bounds, one line each.
    """

    result: Mapping[str, Any] = field(default_factory=dict)
    headline: str = ""
    problems: Sequence[str] = ()


@dataclass(kw_only=True)
class Step:
    """One step of the report; `bundle` is "" for steps about the machine."""

    name: str
    bundle: str
    state: State = "running"
    reason: str = ""
    seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bundle": self.bundle,
            "state": self.state,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "result": dict(self.result),
        }


class DeviceReport:
    """Runs steps, keeps their results and writes them to a file.

    Args:
        out: path of the report.
        private: text that must not appear in it, such as a folder → its replacement.
        say: called with each line for the terminal.
    """

    def __init__(
        self, out: Path, private: Mapping[str, str], say: Callable[[str], None] = print
    ) -> None:
        self.steps: list[Step] = []
        self.finished = False
        self._out, self._say, self._bundle = out, say, ""
        self._shown, self._shown_at = is_terminal(sys.stderr), 0.0
        # the longest first: a folder before the one that it lies in
        self._private = sorted(private.items(), key=lambda item: -len(item[0]))

    @property
    def failed(self) -> list[Step]:
        return [step for step in self.steps if step.state == "failed"]

    def start_bundle(self, name: str) -> None:
        """Start the steps of a bundle."""
        self._bundle = name
        self._say(f"\n{visible(name)}")

    def step(self, name: str, work: Callable[[], Found]) -> Found | None:
        """Run one step; returns its result, None where it was not run or failed.

        Exceptions of `work` are recorded; only KeyboardInterrupt and SystemExit are re-raised.
        """
        step = Step(name=name, bundle=self._bundle)
        self.steps.append(step)
        self.save()
        self.progress(name)
        started, found = time.perf_counter(), None
        try:
            found = work()
            step.result = found.result
            step.state = "failed" if found.problems else "done"
            step.reason = "; ".join(found.problems)
        except NotRunError as reason:
            step.state, step.reason = "not run", str(reason)
        except VarDeployError as error:
            step.state, step.reason = "failed", str(error)
        except Exception as error:  # the steps after this one are worth having all the same
            step.state, step.reason = "failed", f"{type(error).__name__}: {one_line(error)}"
        except BaseException as error:
            step.state, step.reason = "failed", f"ended by {type(error).__name__}"
            raise
        finally:
            step.seconds = time.perf_counter() - started
            step.reason = self._clean(step.reason)
            self.save()
        self._wipe()
        self._say(visible(_line(step, found.headline if found else "")))
        return found

    def progress(self, message: str, fraction: float | None = None) -> None:
        """Show a progress line on a terminal, at most ten times per second."""
        now = time.monotonic()
        if self._shown and (fraction is None or now - self._shown_at > PAUSE):
            self._shown_at = now
            part = "" if fraction is None else f"{fraction:4.0%} "
            print(f"\r\x1b[K  {part}{visible(message)[:70]}", end="", file=sys.stderr, flush=True)

    def _wipe(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        self.finished = True
        self.save()

    def to_json(self) -> dict[str, Any]:
        data = {
            "schema_version": SCHEMA_VERSION,
            "var_deploy": __version__,
            "finished": self.finished,
            "passed": not self.failed,
            "failed": [f"{step.bundle}: {step.name}".removeprefix(": ") for step in self.failed],
            "steps": [step.to_json() for step in self.steps],
        }
        cleaned: dict[str, Any] = self._clean(data)
        return cleaned

    def save(self) -> None:
        """Write by rename. Raises BackendError where the disk refuses, UsageError for a folder."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with whole_file(self._out, error=BackendError) as stream:
            stream.write(text.encode())

    def _clean(self, value: Any) -> Any:
        """The same without what tells whose machine it was."""
        if isinstance(value, str):
            for text, stand_in in self._private:
                value = value.replace(text, stand_in)
            return PATH.sub(lambda path: "…/" + re.split(r"[/\\]", path[0])[-1], value)
        if isinstance(value, Mapping):
            return {key: self._clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(item) for item in value]
        return value


def _line(step: Step, headline: str) -> str:
    told = headline if step.state == "done" else step.reason
    if step.state == "failed" and headline:
        told = f"{headline}: {told}"
    seconds = f" ({step.seconds:.1f} s)" if step.seconds >= 1 else ""
    return f"  {step.state:8}{step.name}{': ' if told else ''}{told}{seconds}"


def latency_table(steps: Sequence[Step]) -> list[str]:
    """Lines of a table with the times of all steps that measured some."""
    rows: list[tuple[str, ...]] = [("", "image ms", "p10", "p95", "call ms", "of the floor")]
    for step in steps:
        if "latency" not in step.result:
            continue
        image, whole = step.result["latency"]["image"], step.result["latency"]["call"]
        part = step.result.get("floor", {}).get("reached")
        rows.append(
            (
                step.name,
                *(f"{image[key]:.2f}" for key in ("median_ms", "p10_ms", "p95_ms")),
                f"{whole['median_ms']:.2f}",
                f"{part:.0%}" if part is not None else "",
            )
        )
    if len(rows) == 1:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
