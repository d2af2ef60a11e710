"""`bench --busy`: other work runs while something is measured, and ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from var_deploy.bench.busy import busy_processors
from var_deploy.errors import BackendError
from var_deploy.host.installation import code_command

INSIDE = """
import os, sys, time
from var_deploy.bench.busy import busy_processors
with busy_processors(2) as pids:
    print(*pids, flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if sys.platform != "linux":
        return True
    try:  # one that ended stays a zombie until its parent, or init, has looked
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def ended(pids: list[int]) -> bool:
    until = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def test_they_compute_within_the_context() -> None:
    with busy_processors(2) as pids:
        assert len(set(pids)) == 2 and all(alive(pid) for pid in pids)
        if sys.platform == "linux":
            stat = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2] for pid in pids]
            assert {state[0] for state in stat} == {"R"}, "running, or waiting for a processor"
    assert not any(alive(pid) for pid in pids)


def test_none_is_none() -> None:
    with busy_processors(0) as pids:
        assert pids == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_they_end_with_an_error(error: type[BaseException]) -> None:
    with pytest.raises(error), busy_processors(1) as pids:
        raise error
    assert not alive(pids[0])


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_they_end_with_the_program(name: str) -> None:
    """Also where the program has no time to end them."""
    with subprocess.Popen(
        code_command(INSIDE), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as program:
        assert program.stdout is not None
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        program.send_signal(getattr(signal, name))
        program.wait(20)
        assert ended(pids)


def test_one_that_cannot_compute_is_an_error() -> None:
    with (
        pytest.raises(BackendError, match="exit code 3"),
        busy_processors(1, code_command("raise SystemExit(3)")),
    ):
        pass
    with pytest.raises(BackendError, match="cannot be started"), busy_processors(1, ["/no/such"]):
        pass


def test_one_that_ends_meanwhile_is_an_error() -> None:
    with (
        pytest.raises(BackendError, match="exit code 4 while"),
        busy_processors(1, code_command("print('busy', flush=True); raise SystemExit(4)")) as pids,
    ):
        assert ended(pids)
