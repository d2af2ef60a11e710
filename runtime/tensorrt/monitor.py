"""Progress of an engine build, and Ctrl-C during it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from var_deploy.progress import Progress


class Interrupt:
    """Records in `pressed` whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.pressed = False

    def press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True


@contextlib.contextmanager
def held_interrupt() -> Iterator[Interrupt]:
    """Delay Ctrl-C until the end of the block, where it then takes effect.

    Does nothing outside the main thread, where no signals arrive, and where SIGINT is ignored.
    """
    interrupt, previous = Interrupt(), signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or previous in (None, signal.SIG_IGN):
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt.press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
        if interrupt.pressed:
            signal.raise_signal(signal.SIGINT)


class PhaseTree:
    """Computes the fraction of a build that is done from TensorRT's nested phases and steps.

    Phases are reported from several threads; a phase's name can be reused after it has finished.
    """

    def __init__(self) -> None:
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name → parent, steps, done
        self._best, self._lock = 0.0, threading.Lock()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[phase] = (parent, max(steps, 1), 0)

    def step(self, phase: str, step: int) -> float:
        """Record that step `step`, counted from 0, is done; return the fraction of the build.

        The fraction never decreases, although later phases without a parent are not known.
        """
        with self._lock:
            if phase in self._phases:
                parent, steps, _ = self._phases[phase]
                self._phases[phase] = (parent, steps, min(step + 1, steps))
            roots = [name for name, (parent, _, _) in self._phases.items() if self._root(parent)]
            self._best = max([self._best, *(self._fraction(name) for name in roots)])
            return self._best

    def finish(self, phase: str) -> None:
        with self._lock:
            self._phases.pop(phase, None)

    def _root(self, parent: str | None) -> bool:
        return parent not in self._phases

    def _fraction(self, phase: str) -> float:
        _, steps, done = self._phases[phase]
        inside = [
            self._fraction(name) for name, (parent, _, _) in self._phases.items() if parent == phase
        ]
        return min(done + max(inside, default=0.0), steps) / steps


def build_monitor(trt: Any, on_progress: Progress | None, stopped: Callable[[], bool]) -> Any:
    """Create an IProgressMonitor of the module `trt`.

    It calls `on_progress` with fractions, and stops the build when `stopped` returns True. Its
    attribute `failures` holds exceptions of the callbacks.
    """
    phases = PhaseTree()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        """Keeps exceptions, which must not reach TensorRT's C++ code, and stops the build."""

        def __init__(self) -> None:
            super().__init__()  # pybind11 refuses an instance that skipped it
            self.failures: list[BaseException] = []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                fraction = phases.step(phase_name, step)
                if on_progress is not None:
                    on_progress(phase_name, fraction)
                return not (self.failures or stopped())
            except BaseException as error:
                self.failures.append(error)
                return False

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
