"""Starts and controls the process of a worker, and watches its memory.

A worker that dies, that does not answer in time or that answers something unexpected raises a
`BackendError` with one line, and its process is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from var_deploy.bench.worker import GENERATE, About, Sample
from var_deploy.errors import BackendError

LOAD_SECONDS = 900.0
GENERATE_SECONDS = 1800.0  # torch.compile compiles during the first generation
CLOSE_SECONDS = 10.0
WATCH_SECONDS = 0.05
PSS = re.compile(r"^Pss:\s+(\d+) kB", re.M)


class WorkerProcess:
    """The process of a worker (see `worker.serve`); a context manager that ends it.

    Args:
        command: the program and its arguments.
        load_seconds, generate_seconds: time limits for loading and for one generation.

    Attributes:
        loaded: seconds from the start of the process until it was ready, None before.
        cold: seconds from the start of the process to the end of its first generation, None
            before.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        load_seconds: float = LOAD_SECONDS,
        generate_seconds: float = GENERATE_SECONDS,
    ) -> None:
        self.loaded: float | None = None
        self.cold: float | None = None
        self._load_seconds, self._generate_seconds = load_seconds, generate_seconds
        self._gone = False
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        self._started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # no Ctrl-C for the worker; `kill` ends its children
            )
        except OSError as error:
            self._errors.close()
            raise BackendError(f"{command[0]} cannot be started: {error.strerror}") from None
        self._replies: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> About:
        """Wait until the worker is loaded; returns its description."""
        about = About.read(self._reply(self._load_seconds, "loading").get("ready"))
        if about is None:
            raise self._refuse("did not say that it is ready")
        if self.loaded is None:
            self.loaded = time.perf_counter() - self._started
        return about

    def generate(self) -> Sample:
        """Request one generation and wait for it."""
        if self._gone:
            raise BackendError("the program has ended")
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{GENERATE}\n".encode())
            self._process.stdin.flush()
        except OSError:
            pass  # the process has ended, which `_reply` reports
        reply = self._reply(self._generate_seconds, "generating")
        try:
            launches = {str(name): float(s) for name, s in reply["launches"].items()}
            sample = Sample(seconds=float(reply["seconds"]), launches=launches)
            if not sample.seconds > 0:
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._refuse(f"gave an answer without times: {str(reply)[:80]}") from None
        if self.cold is None:
            self.cold = time.perf_counter() - self._started
        return sample

    def close(self) -> None:
        """Let the worker end by itself, else kill it and its children; safe to call twice."""
        if self._gone:
            return
        try:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the worker and its children at once; safe to call twice."""
        if self._gone:
            return
        self._gone = True
        if hasattr(os, "killpg"):  # also where it has ended: its children may live on
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._errors.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.kill()

    def _listen(self) -> None:
        """Put the worker's lines into a queue; runs in a thread, so that waits can time out."""
        assert self._process.stdout is not None
        with self._process.stdout as replies:
            for line in replies:
                self._replies.put(line)
        self._replies.put(None)

    def _reply(self, seconds: float, doing: str) -> Mapping[str, Any]:
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            raise self._refuse(f"gave no answer within {seconds:g} s of {doing}") from None
        if line is None:
            raise BackendError(f"the program {self._last_words()}")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._refuse(f"gave no answer but {line[:80].decode(errors='replace').strip()!r}")
        if "problem" in reply:
            self.kill()
            raise BackendError(" ".join(str(reply["problem"]).split()) or "failed without a word")
        return reply

    def _refuse(self, why: str) -> BackendError:
        self.kill()
        return BackendError(f"the program {why}")

    def _last_words(self) -> str:
        """Describe how the worker ended, with the last line that it wrote to stderr."""
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            told = "closed its output without a word"
        else:
            told = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            told += ", as where memory runs out" if code == -signal.SIGKILL else ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.kill()
        return f"{told}: {' '.join(lines[-1].split())}" if lines else told


class MemoryWatch:
    """Reads a process's PSS (proportional set size) every 50 ms within the context.

    PSS divides shared pages among the processes that map them, so no other process may map the
    files of the watched one. Reading takes milliseconds per gigabyte: do not time anything
    meanwhile.

    Attributes:
        peak: largest PSS in bytes, None where it could not be read; `problem`: the reason.
    """

    def __init__(self, pid: int, proc: Path = Path("/proc")) -> None:
        self.peak: int | None = None
        self.problem = ""
        self._file = proc / str(pid) / "smaps_rollup"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        if self.peak is None and not self.problem:
            self.problem = "the kernel did not tell"

    def _watch(self) -> None:
        while not self._done.wait(WATCH_SECONDS):
            self._look()

    def _look(self) -> None:
        try:
            text = self._file.read_text()
        except OSError as error:
            if self.peak is None:
                self.problem = f"/proc/PID/smaps_rollup: {error.strerror}"
            return
        if found := PSS.search(text):
            self.peak = max(self.peak or 0, int(found.group(1)) << 10)
