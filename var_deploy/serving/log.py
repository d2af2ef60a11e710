"""The service's log on stderr: one line per request and per error, as text or as JSON.

Lines contain only printable ASCII, so that a client can neither forge a line nor send commands to a
terminal. A thread writes them: if the reader of stderr is too slow, lines are dropped and counted,
and no request waits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

LONGEST = 200  # characters of a path
WAITING = 10_000  # lines that may wait to be written
FLUSH = 2.0  # seconds in which the last lines must have been written
OURS = ("var_deploy", "uvicorn")  # the loggers

access_log = logging.getLogger("var_deploy.access")
log = logging.getLogger("var_deploy.serving")


@dataclass(frozen=True, kw_only=True)
class Access:
    """The log record of one request. Method and path are "" where the request was unreadable."""

    client: Any
    status: int
    seconds: float
    method: str = ""
    path: str = ""
    sent: int = 0
    images: int = 0


def write_access(access: Access) -> None:
    """Log one request at level info."""
    if access_log.isEnabledFor(logging.INFO):
        access_log.info("request", extra={"access": access})


def plain(text: str, longest: int = LONGEST) -> str:
    """Return a text as printable ASCII without spaces: escaped as in a URL, and cut where long."""
    short = text if len(text) <= longest else text[:longest] + "..."
    return "".join(
        c if "!" <= c <= "~" else "".join(f"%{b:02X}" for b in c.encode("utf-8", "replace"))
        for c in short
    )


def printable(text: str) -> str:
    """Return a text as one line of printable ASCII, escaped as in a Python string."""
    return ascii(text)[1:-1]


def _fields(access: Access) -> dict[str, Any]:
    host = str(access.client[0]) if access.client else ""
    return {
        "client": plain(host.removeprefix("::ffff:"), 60) or "-",
        "method": plain(access.method, 20) or "-",
        "path": plain(access.path) or "-",
        "status": access.status,
        "seconds": round(access.seconds, 3),
        "bytes": access.sent,
        "images": access.images,
    }


def _time(record: logging.LogRecord) -> str:
    """UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


class TextFormat(logging.Formatter):
    """Formats a record as TIME LEVEL message, or CLIENT METHOD PATH STATUS seconds bytes images."""

    def format(self, record: logging.LogRecord) -> str:
        start = f"{_time(record)} {record.levelname.lower()}"
        access = getattr(record, "access", None)
        if isinstance(access, Access):
            f = _fields(access)
            images = f" {f['images']} image{'s' * (f['images'] != 1)}" if f["images"] else ""
            return (
                f"{start} {f['client']} {f['method']} {f['path']} {f['status']} "
                f"{f['seconds']:.3f} s {f['bytes']} B{images}"
            )
        lines = [f"{start} {printable(record.getMessage())}"]
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            lines += [f"  {printable(line)}" for line in trace.splitlines()]
        return "\n".join(lines)


class JsonFormat(logging.Formatter):
    """Formats a record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        access = getattr(record, "access", None)
        if isinstance(access, Access):
            said |= _fields(access)
        else:
            said["message"] = record.getMessage()
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


class Writer(logging.Handler):
    """A logging handler whose thread writes the lines to a stream."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1
        except Exception:
            self.handleError(record)

    def end(self) -> None:
        """Wait until all lines are written, FLUSH seconds at most."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=FLUSH)
            self._thread.join(FLUSH)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            lost, self._lost = self._lost, 0
            if lost:
                line += f"\n{lost} lines of the log were lost: they were not read in time"
            with contextlib.suppress(OSError, ValueError):  # closed, or the disk is full
                self._stream.write(line + "\n")
                self._stream.flush()


@contextlib.contextmanager
def logging_to_stderr(level: str, form: str) -> Iterator[None]:
    """Write what the service and uvicorn log to stderr until the end of the block.

    Where there is no stderr, nothing is written. `level` is the name of one of
    logging's levels in lower case, `form` "text" or "json".
    """
    if sys.stderr is None:
        yield
        return
    writer = Writer(sys.stderr)
    writer.setFormatter(JsonFormat() if form == "json" else TextFormat())
    number = getattr(logging, level.upper())
    loggers = [logging.getLogger(name) for name in OURS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(writer)
        logger.propagate = False
    writer.setLevel(number)
    loggers[0].setLevel(number)
    try:
        yield
    finally:
        for logger, (old, propagates) in zip(loggers, before, strict=True):
            logger.removeHandler(writer)
            logger.setLevel(old)
            logger.propagate = propagates
        writer.end()
