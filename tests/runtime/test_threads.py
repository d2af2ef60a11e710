"""Threads of a pipeline: as many as the process may use, and where it may run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from fake_machine import FakeMachine
from var_deploy.bench.busy import busy_processors
from var_deploy.bench.run import Settings
from var_deploy.config import RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.host.machine import Machine, is_crowded, running_elsewhere, usable_cores
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends import onnxruntime_cpu
from var_deploy.runtime.backends.ort_session import version_of

ExportTo = Callable[..., Path]

SCRIPT = """
import glob, json, os, sys
os.sched_setaffinity(0, {int(sys.argv[2])})
from var_deploy.pipeline import Pipeline
found = []
for threads in (None, 3):
    with Pipeline.load(sys.argv[1], threads=threads) as pipe:
        pipe.generate([0])
        masks = set()
        for path in glob.glob("/proc/self/task/*/status"):
            with open(path) as status:
                masks |= {line.split()[1] for line in status if line.startswith("Cpus_allowed_l")}
        found.append([pipe.describe().settings["threads"], sorted(masks)])
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="masks are Linux's")
def test_no_thread_runs_outside_of_the_mask(export_to: ExportTo) -> None:
    """On each processor by itself: ONNX Runtime's own choice is pinned to all but the first."""
    for number in sorted(os.sched_getaffinity(0))[:2]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, export_to(batch=2), str(number)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == [["1", [str(number)]], ["3", [str(number)]]]
        assert done.stderr == ""


def test_the_number_is_told(export_to: ExportTo) -> None:
    with Pipeline.load(export_to(batch=2)) as pipe:
        assert pipe.describe().settings["threads"] == str(usable_cores() or "all cores")


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(allow_spinning, spin_duration_us) of each session that is made; "" where it is not set."""
    told: list[tuple[str, str]] = []
    made = onnxruntime.InferenceSession
    added: dict[int, dict[str, str]] = {}
    add = onnxruntime.SessionOptions.add_session_config_entry

    def note(self: Any, key: str, value: str) -> None:
        added.setdefault(id(self), {})[key] = value
        add(self, key, value)

    def session(model: Any, options: Any, **how: Any) -> Any:
        entries = added.pop(id(options), {})
        keys = ("allow_spinning", "spin_duration_us")
        told.append(tuple(entries.get(f"session.intra_op.{key}", "") for key in keys))
        return made(model, options, **how)

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", note)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return told


def others_run(monkeypatch: pytest.MonkeyPatch, *counts: int) -> None:
    """So many threads of other programs run, each time that it is looked."""
    looks = iter(counts)
    monkeypatch.setattr(onnxruntime_cpu, "running_elsewhere", lambda machine: next(looks))
    monkeypatch.setattr(Machine, "total_processors", lambda self: 5)


def load(bundle: Path, threads: int) -> tuple[str, str | None]:
    with Pipeline.load(bundle, threads=threads) as pipe:
        settings = pipe.describe().settings
        return settings["threads"], settings.get("spinning")


def test_waiting_threads_sleep_soon(
    export_to: ExportTo, monkeypatch: pytest.MonkeyPatch, sessions: list[tuple[str, str]]
) -> None:
    others_run(monkeypatch, 0, 0, 9, 0, 0, 9, 2, 2, 0, 0, 9, 9)
    quiet = ("", "100")
    bounded = version_of(onnxruntime) >= (1, 26)
    words = "100 µs" if bounded else "ONNX Runtime's default"
    # nothing else runs; then something runs for a moment; then enough processors are left
    for threads in (4, 4, 4, 3):
        bundle = export_to(batch=2)
        assert load(bundle, threads) == (str(threads), words)
    assert sessions == 12 * [quiet], "condition, step, decoder"
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.2")
    assert load(bundle, 4) == ("4", "ONNX Runtime's default")
    assert load(bundle, 1) == ("1", None), "one thread waits for no other"


def test_waiting_threads_sleep_at_once_where_others_run(
    export_to: ExportTo, monkeypatch: pytest.MonkeyPatch, sessions: list[tuple[str, str]]
) -> None:
    others_run(monkeypatch, 2, 3, 0)
    told = "off, since other programs were running"
    with Pipeline.load(export_to(batch=2), threads=4) as pipe:
        assert sessions == 3 * [("0", "")]
        assert pipe.describe().settings["spinning"] == told
        with Pipeline.load(export_to(batch=2), threads=4) as other:
            assert len(sessions) == 3, "they share what is loaded, whatever the machine does now"
            assert other.describe().settings["spinning"] == told


@pytest.mark.parametrize(
    ("loadavg", "own", "found"),
    [
        ("0.10 0.20 0.30 4/345 12\n", 1, 3),
        ("0.10 0.20 0.30 1/345 12\n", 2, 0),
        ("0.00 0.00 0.00 0/0 0\n", 1, 0),
        ("", 1, 0),
        (None, 1, 0),
    ],
)
def test_threads_of_other_programs(
    monkeypatch: pytest.MonkeyPatch, loadavg: str | None, own: int, found: int
) -> None:
    machine = FakeMachine(files={} if loadavg is None else {"/proc/loadavg": loadavg})
    monkeypatch.setattr(FakeMachine, "running_threads", lambda self: own)
    assert running_elsewhere(machine) == found


def test_crowded() -> None:
    four = FakeMachine(processors=4)
    assert [is_crowded(four, 3, others) for others in (0, 1, 2)] == [False, False, True]
    assert not is_crowded(four, 9, 0), "then the threads are in nobody's way but their own"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_of_this_process() -> None:
    assert Machine().running_threads() >= 1
    with busy_processors(1):
        until = time.monotonic() + 20
        while not running_elsewhere(Machine()) and time.monotonic() < until:
            time.sleep(0.01)
        assert running_elsewhere(Machine()) >= 1


def test_the_number_of_threads_changes_no_bit(export_to: ExportTo) -> None:
    """So it may be chosen by what the machine does."""
    images = []
    for threads in (1, 2, 3, 5):
        with Pipeline.load(export_to(batch=2), precision="fp32", threads=threads) as pipe:
            images.append(pipe.generate([0, 1, 2], seed=7))
    for other in images[1:]:
        np.testing.assert_array_equal(other, images[0])


@pytest.mark.parametrize("number", [100_000, 10**30, -1, True, 1.5])
def test_absurd_numbers_are_refused_at_once(export_to: ExportTo, number: Any) -> None:
    for start in (
        lambda: Pipeline.load(export_to(batch=2), threads=number),
        lambda: Settings(configs=(RuntimeConfig(threads=number),)),
    ):
        with pytest.raises(UsageError, match="threads must be"):
            start()
