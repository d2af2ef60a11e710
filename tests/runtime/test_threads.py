"""Threads of a pipeline: as many as the process may use, and where it may run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from var_deploy.bench.run import Settings
from var_deploy.config import RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.host.machine import usable_cores
from var_deploy.pipeline import Pipeline
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


def test_waiting_threads_sleep_soon(
    export_to: ExportTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every session is told, whatever the number; what is said of it depends on the version."""
    key, told = "session.intra_op.spin_duration_us", []
    made = onnxruntime.InferenceSession

    def session(model: Any, options: Any, **how: Any) -> Any:
        told.append(options.get_session_config_entry(key))
        return made(model, options, **how)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with Pipeline.load(export_to(batch=2), threads=5) as pipe:
        settings = pipe.describe().settings
    assert told == ["100"] * 3, "condition, step, decoder"
    bounded = version_of(onnxruntime) >= (1, 26)
    words = "100 µs" if bounded else "as ONNX Runtime does by default"
    assert (settings["threads"], settings["spinning"]) == ("5", words)
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.2")
    with Pipeline.load(export_to(batch=2), threads=5) as pipe:
        assert pipe.describe().settings["spinning"] == "as ONNX Runtime does by default"
    with Pipeline.load(export_to(batch=2), threads=1) as pipe:
        assert "spinning" not in pipe.describe().settings, "one thread waits for no other"


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
