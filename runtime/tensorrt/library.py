"""Imports TensorRT: the module `tensorrt` (10.3 to 11.x) or `tensorrt_rtx`, which share an API.

No other module imports them; the others receive a `Library`, which can also hold a stand-in.
"""

from __future__ import annotations

import importlib
from collections import deque
from functools import cache
from typing import Any

from var_deploy.config import TENSORRT, TENSORRT_RTX
from var_deploy.errors import BackendError, UsageError, one_line
from var_deploy.host.installation import pip_command, pip_install

OLDEST = (10, 3)  # JetPack 6.1
KEPT_LINES = 20
SHOWN_LINES = 3
SHOWN_CHARACTERS = 700

LIBRARIES = (TENSORRT, TENSORRT_RTX)


class Library:
    """An imported TensorRT module with its name, version and logger.

    Attributes:
        module: `tensorrt`, `tensorrt_rtx` or a stand-in.
        name: "tensorrt" or "tensorrt_rtx".
        version: the module's version; an engine runs only with the version that built it.
        logger: an ILogger that keeps the last error lines: `errors()`, `clear()`.
    """

    def __init__(self, module: Any, name: str = TENSORRT) -> None:
        self.module, self.name = module, name
        self.version = str(module.__version__)
        self.logger = _error_log(module)

    @property
    def is_rtx(self) -> bool:
        return self.name == TENSORRT_RTX

    def words(self) -> str:
        """TensorRT's errors since the logger was cleared, on one line.

        The first error is the cause, the last one names the call that failed; of many errors, those
        in between are left out.
        """
        lines = list(dict.fromkeys(self.logger.errors()))
        if len(lines) > SHOWN_LINES:
            lines = [*lines[: SHOWN_LINES - 1], lines[-1]]
        text = "; ".join(lines) or "it gave no reason"
        return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def load_library(prefer: str | None = None) -> Library:
    """Import `prefer`, or the first of `tensorrt` and `tensorrt_rtx` that is installed.

    Raises UsageError for another name, BackendError where the module is missing, does not load or
    is too old, with what to do about it.
    """
    if prefer is not None and prefer not in LIBRARIES:
        raise UsageError(f"library must be {TENSORRT} or {TENSORRT_RTX}, found {prefer!r}")
    for name in (prefer,) if prefer else (TENSORRT, TENSORRT_RTX):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise BackendError(_broken(name, error)) from None
            continue
        except Exception as error:  # a shared library that is missing, of any exception type
            raise BackendError(_broken(name, error)) from None
        return _checked(module, name)
    missing = f"{prefer} is not" if prefer else f"neither {TENSORRT} nor {TENSORRT_RTX} is"
    raise BackendError(f"{missing} installed: {_remedy(prefer or TENSORRT)}")


def _checked(module: Any, name: str) -> Library:
    if not hasattr(module, "Builder"):
        # a folder of this name on the path, or the empty package that holds the name on PyPI
        where = getattr(module, "__file__", None) or "its place"
        raise BackendError(f"the module {name} in {where} is not NVIDIA's: {_remedy(name)}")
    library = Library(module, name)
    parts = library.version.split(".")[:2]
    oldest = ".".join(map(str, OLDEST))
    if name == TENSORRT and tuple(int(p) for p in parts if p.isdigit()) < OLDEST:
        raise BackendError(
            f"tensorrt {library.version} is too old, {oldest} or newer is needed: {_remedy(name)}"
        )
    return library


def _broken(name: str, error: Exception) -> str:
    words = one_line(error)
    return f"{name} is installed but does not load ({words}); install it again: {_remedy(name)}"


def _remedy(name: str) -> str:
    """How to install the library."""
    if name == TENSORRT_RTX:
        return f"run {pip_command(TENSORRT_RTX)}"
    return (
        "on a Jetson it comes with JetPack (make the virtual environment with "
        f"--system-site-packages), elsewhere run {pip_install('tensorrt')}"
    )


@cache
def _error_log(module: Any) -> Any:
    """The error logger of a module, created once.

    TensorRT sends some lines to the first logger that it got, and no object of TensorRT may outlive
    its logger.
    """
    severity = module.ILogger.Severity
    kept = (severity.INTERNAL_ERROR, severity.ERROR)

    class ErrorLog(module.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self._lines: deque[str] = deque(maxlen=KEPT_LINES)

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                self._lines.append(" ".join(str(msg).split()))

        def errors(self) -> list[str]:
            return list(self._lines)

        def clear(self) -> None:
            self._lines.clear()

    return ErrorLog()
