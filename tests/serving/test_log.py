"""The log: a line per request, which nobody can forge, and which nothing waits for."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import time
from typing import Any

import pytest
from serving.client import PATIENCE, Client

pytest.importorskip("fastapi", reason="the extra serve is not installed")

LINE = (
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info 127\.0\.0\.1 (\S+) (\S+) (\d+) "
    r"\d+\.\d{3} s \d+ B(?: (\d+) images?)?"
)


def logged(
    monkeypatch: pytest.MonkeyPatch,
    asks: Any,
    form: str,
    level: str = "info",
    lines: int = 1,
) -> list[str]:
    """The lines, at least so many, that are written while `asks` is called and soon after: a
    client has its answer before the service has logged it."""
    from var_deploy.serving.log import logging_to_stderr

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    end = time.monotonic() + PATIENCE
    with logging_to_stderr(level, form):
        asks()
        while stream.getvalue().count("\n") < lines and time.monotonic() < end:
            time.sleep(0.01)
    return stream.getvalue().splitlines()


def test_a_line_per_request(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks() -> None:
        service.get("/health")
        service.post("/v1/images", {"labels": [1, 2]})
        with service.stream("/v1/images/stream", {"labels": [1]}) as events:
            assert list(events)
        service.ask("HEAD", "/nothing", None, {})

    lines = logged(monkeypatch, asks, "text", lines=4)
    found = [re.fullmatch(LINE, line) for line in lines]
    assert all(found), lines
    # in any order: a line is written once the client has its answer, and may have asked again
    assert {one.groups() for one in found if one} == {
        ("GET", "/health", "200", None),
        ("POST", "/v1/images", "200", "2"),
        ("POST", "/v1/images/stream", "200", "1"),
        ("HEAD", "/nothing", "404", None),
    }


def test_a_line_as_json(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(monkeypatch, lambda: service.post("/v1/images", {}), "json")
    (line,) = [json.loads(line) for line in lines]
    assert line.pop("time") and line.pop("seconds") > 0 and line.pop("bytes") > 100
    assert line == {
        "level": "info",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/images",
        "status": 200,
        "images": 1,
    }


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "path", ["/%0a2026-01-01 forged", "/%1b[2J%1b]0;title%07", "/%c2%9b31m", "/é\u2028", "/%ff"]
)
def test_no_line_can_be_forged(
    service: Client, monkeypatch: pytest.MonkeyPatch, form: str, path: str
) -> None:
    path = "".join(c if "!" <= c <= "~" else "%20" if c == " " else "%e2%80%a8" for c in path)
    lines = logged(monkeypatch, lambda: service.get(path), form)
    assert len(lines) == 1 and lines[0].isascii() and lines[0].isprintable()
    long = logged(monkeypatch, lambda: service.get("/" + "x" * 9000), form)
    assert len(long) == 1 and len(long[0]) < 400


def test_labels_reach_neither_log_nor_terminal_raw(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = "\x1b[2J\x9b31m\u202e"

    def asks() -> None:
        for body in ({"labels": [label]}, {label: 1}, {"format": label}):
            reply = service.post("/v1/images", body)
            text = reply.data.decode()
            assert reply.status == 400 and text.isprintable(), text
            assert reply.error.isprintable()

    lines = logged(monkeypatch, asks, "text", lines=3)
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


def test_levels(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from var_deploy.serving.log import log

    def asks() -> None:
        service.get("/health")
        log.error("a failure\nof two lines")

    (line,) = logged(monkeypatch, asks, "text", "warning")
    assert line.endswith("Z error a failure\\nof two lines")
    assert logged(monkeypatch, asks, "text", "critical", lines=0) == []
    assert len(logged(monkeypatch, asks, "text", "debug", lines=2)) == 2
    assert logging.getLogger("var_deploy").handlers == []  # nothing stays behind


def test_a_traceback_is_escaped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from var_deploy.serving.log import log

    def fails() -> None:
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            log.exception("failed")

    lines = logged(monkeypatch, fails, "text")
    assert len(lines) > 3 and lines[-1] == "  ValueError: \\x1b[2J"
    (line,) = logged(monkeypatch, fails, "json")
    assert json.loads(line)["traceback"].endswith("ValueError: \x1b[2J")


class Stuck(io.StringIO):
    """A terminal or pipe that takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait()
        return super().write(text)


def test_a_log_that_nobody_reads_holds_nobody_up(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from var_deploy.serving import log

    monkeypatch.setattr(log, "WAITING", 5)
    stream = Stuck()
    monkeypatch.setattr(sys, "stderr", stream)
    with log.logging_to_stderr("info", "text"):
        for _ in range(20):
            assert service.get("/health").status == 200
        stream.free.set()
    lines = stream.getvalue().splitlines()
    assert 5 <= len(lines) < 20 and any("lines of the log were lost" in line for line in lines)


def test_without_stderr(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from var_deploy.serving.log import logging_to_stderr

    monkeypatch.setattr(sys, "stderr", None)
    with logging_to_stderr("info", "text"):
        assert service.get("/health").status == 200
