"""A worker and the one who asks it, in good and in bad days."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fake_worker import LAUNCHES, command
from var_deploy.bench import process as module
from var_deploy.bench.process import MemoryWatch, WorkerProcess
from var_deploy.bench.worker import About, Sample, serve
from var_deploy.errors import BackendError, BundleError

Start = Callable[..., WorkerProcess]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def start(log: Path) -> Iterator[Start]:
    """Starts a fake; whatever a test leaves is ended."""
    with contextlib.ExitStack() as stack:

        def begin(manner: str = "", **options: float) -> WorkerProcess:
            return stack.enter_context(WorkerProcess(command("fake", log, manner), **options))

        yield begin


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# the worker's side


class Dummy:
    closed = False

    def describe(self) -> About:
        return About(settings={"precision": "fp32"}, graphs="fp32")

    def generate(self) -> Sample:
        raise BundleError("two\nlines")

    def close(self) -> None:
        self.closed = True


def served(make: Callable[[], Dummy], *requests: str) -> tuple[int, list[dict[str, object]]]:
    replies = io.StringIO()
    code = serve(make, io.StringIO("".join(f"{r}\n" for r in requests)), replies)
    return code, [json.loads(line) for line in replies.getvalue().splitlines()]


def test_it_answers_each_line_with_a_line() -> None:
    dummy = Dummy()
    code, replies = served(lambda: dummy, "generate", "sing")
    assert replies == [
        {
            "ready": {
                "settings": {"precision": "fp32"},
                "graphs": "fp32",
                "backend": "",
                "threads": 0,
                "reason": "",
                "loading": {},
                "work": {},
            }
        },
        {"problem": "two lines"},
        {"problem": "unknown request 'sing'"},
    ]
    assert code == 0
    assert dummy.closed


def test_what_cannot_be_loaded_is_a_problem() -> None:
    def make() -> Dummy:
        raise ModuleNotFoundError("No module named 'torch'")

    said = "ModuleNotFoundError: No module named 'torch'"
    assert served(make, "generate") == (1, [{"problem": said}])


# the asker's side


def test_a_worker_loads_generates_and_ends(start: Start, log: Path) -> None:
    worker = start()
    said = worker.ready()
    assert said.settings == {"threads": "2", "precision": "fp32", "name": "fake"}
    assert (said.graphs, said.threads, said.backend, said.reason) == ("fp32", 2, "", "")
    assert worker.cold is None
    assert worker.generate() == Sample(seconds=0.010, launches=LAUNCHES)
    cold = worker.cold
    assert cold is not None and cold > 0
    worker.generate()
    assert worker.cold == cold, "of the first generation alone"
    worker.close()
    worker.close()
    assert gone(worker.pid)
    assert log.read_text() == "fake\nfake\n"


def test_what_a_library_prints_is_no_answer(start: Start) -> None:
    worker = start("noisy")
    assert worker.ready().settings["name"] == "fake"
    assert worker.generate().seconds == worker.generate().seconds == 0.010


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("refuses", "^ValueError: no such precision$"),
        ("dies loading", "^the program ended with exit code 3: Segmentation fault, or so$"),
        ("babbles", "gave no answer but 'good morning'"),
        ("hangs loading", "gave no answer within 0.5 s of loading"),
    ],
)
def test_loading_can_fail(start: Start, manner: str, words: str) -> None:
    worker = start(manner, load_seconds=0.5 if manner.startswith("hangs") else 30)
    with pytest.raises(BackendError, match=words):
        worker.ready()
    assert gone(worker.pid)


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("fails", "^MemoryError$"),
        ("dies later", "ended by signal 15"),
        ("hangs", "gave no answer within 0.5 s of generating"),
    ],
)
def test_generating_can_fail(start: Start, manner: str, words: str) -> None:
    worker = start(manner, generate_seconds=0.5 if manner == "hangs" else 30)
    worker.ready()
    with pytest.raises(BackendError, match=words):
        for _ in range(3):
            worker.generate()
    assert gone(worker.pid)
    with pytest.raises(BackendError, match="has ended"):
        worker.generate()


def test_what_a_worker_started_ends_with_it(start: Start, log: Path) -> None:
    worker = start("has a child")
    worker.ready()
    child = int(log.read_text())
    assert not gone(child)
    worker.kill()
    assert gone(child)


def test_one_that_does_not_end_is_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.1)
    worker = start("hangs loading")
    worker.close()
    assert gone(worker.pid)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(BackendError, match=r"^/no/such cannot be started: No such file"):
        WorkerProcess(["/no/such"])


def test_an_answer_without_times() -> None:
    code = "print('{\"ready\": {\"settings\": {}}}'); input(); print('{\"seconds\": \"long\"}')"
    with WorkerProcess([sys.executable, "-uc", code]) as worker:
        assert worker.ready() == About(settings={})
        with pytest.raises(BackendError, match="gave an answer without times"):
            worker.generate()


# memory


def test_the_peak_is_the_largest_pss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 60.0)  # only at both ends
    file = tmp_path / "7" / "smaps_rollup"
    file.parent.mkdir()
    file.write_text("Rss:  9999 kB\nPss:  3000 kB\nPss_Dirty:  1 kB\n")
    with MemoryWatch(7, tmp_path) as watch:
        assert watch.peak == 3000 << 10
        file.write_text("Rss:  9999 kB\nPss:  2000 kB\n")
    assert (watch.peak, watch.problem) == (3000 << 10, "")
    with MemoryWatch(7, tmp_path) as watch:
        file.unlink()
    assert watch.peak == 2000 << 10, "a process that has ended was as large as it was"


def test_memory_that_nobody_tells_is_unknown(tmp_path: Path) -> None:
    with MemoryWatch(7, tmp_path) as watch:
        pass
    assert watch.peak is None
    assert watch.problem == "/proc/PID/smaps_rollup: No such file or directory"
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps_rollup").write_text("Rss: 1 kB\n")
    with MemoryWatch(7, tmp_path) as watch:
        pass
    assert (watch.peak, watch.problem) == (None, "the kernel did not tell")


@pytest.mark.skipif(sys.platform != "linux", reason="PSS is Linux's")
def test_of_a_real_process() -> None:
    with MemoryWatch(os.getpid()) as watch:
        pass
    assert watch.peak is not None and watch.peak > 10_000_000
