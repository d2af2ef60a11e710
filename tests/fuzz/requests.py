"""Damaged requests, each made from a number, and one attempt with a live service."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import json
import logging
import random
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from var_deploy.errors import UsageError

SHORT = 0.15  # seconds that the service waits for a head or a body
PATIENCE = 60  # seconds for an answer, on a machine that is busy with something else
ROUTES = ("/v1/images", "/v1/images/stream", "/v1/edit", "/v1/edit/stream")
PATHS = (*ROUTES, "/", "/health", "/metrics", "/docs", "/openapi.json", "/v1/model", "/page/app.js")
METHODS = (*("GET", "HEAD", "POST") * 3, "PUT", "OPTIONS", "post", "CONNECT", "\xff")
NAMES = ("labels", "label", "count", "seed", "cfg", "top_k", "top_p", "temperature", "deadline")
NAMES += ("format", "image", "mask", "box", "outside", "keep_pixels")
NAMES += ("prompt", "prompts", "negative")
WRONG_NAMES = ("lables", "", "a\0b", "\x1b[2J")
PLAUSIBLE: tuple[tuple[str, Any], ...] = (
    *(("seed", [5, 6]), ("seed", 2**64 - 1), ("count", 1), ("cfg", 0), ("cfg", [1.0] * 5)),
    *(("top_k", 50), ("top_p", 0.9), ("temperature", 2), ("deadline", 30), ("deadline", 0.001)),
    *(("format", "png"), ("format", None), ("format", "json")),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 3.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**300, 10**400),
    *("", "star", "3", "gif", "png", "\x1b[31m\x9b", "\ud800", "x" * 300, "x" * 40_000, ".*"),
    *([], [1, 2], ["star"], [None], [[]], [1] * 3000, {}, {"a": {}}),
)
LITERALS = ("NaN", "-Infinity", "1e999", "9" * 6000, "[" * 3000, '"\\ud800', "01", "'a'", "\0")
HEADERS = (
    *("Host: localhost", "Host: evil.example", "Host: [::1]:8000", "Host:", "Host: \x1b"),
    *("Content-Length: 5", "Content-Length: -1", "Content-Length: 99999999999999999999"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Expect: 100-continue"),
    *("Upgrade: websocket\r\nConnection: Upgrade", "Connection: close", "Accept: image/png"),
    *("X-Forwarded-For: \x1b[2J, 1.2.3.4", "Content-Type: text/plain", "X: " + "y" * 20_000),
)
LARGE = (b"null,", b"{},", b'"",', b'"a":1,', b"[", b'\\"', b"\\\\", b"9", b" ", b"\\u0041")
LIVE = contextlib.ExitStack()  # what it holds would else end when nothing refers to it


@functools.cache
def photo() -> str:
    """A picture of 100 × 90 as base64, which is too long to be parsed with the rest."""
    pixels = np.random.default_rng(1).integers(0, 256, (90, 100, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def valid(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body that it takes."""
    route = chance.choice(ROUTES)
    if "edit" in route:
        return route, {"image": photo(), "box": [0, 0, 50, 90], "label": 1, "seed": 3}
    return route, {"labels": ["star", 3], "seed": chance.randrange(99), "cfg": 1.5, "count": 2}


def request(number: int) -> bytes:
    """The request of this number. Every fourth is valid before its bytes are damaged."""
    chance = random.Random(number)
    route, body = valid(chance)
    method, headers = "POST", ["Host: localhost", "Content-Type: application/json"]
    kind = number % 4
    if kind == 1:  # fields
        body |= chance.sample(PLAUSIBLE, 2)
        for _ in range(chance.choice((0, 1, 3))):
            body[chance.choice(NAMES + WRONG_NAMES)] = chance.choice(VALUES)
    data = json.dumps(body).encode()
    if kind == 2:  # text that need be no JSON, or a great deal of it
        literal = chance.choice(LITERALS).encode()
        large = chance.choice(LARGE) * chance.choice((1, 100, 10_000, 200_000))
        start, end = chance.choice(((b'":', b"}"), (b'":"', b'"}'), (b'":[', b"0]}"), (b"", b"")))
        data = b'{"' + chance.choice(NAMES).encode() + start + chance.choice((literal, large)) + end
    if kind == 3:  # head
        method, route = chance.choice(METHODS), chance.choice(PATHS)
        route += chance.choice(("", "", "/", "?a=%00", "/%2e%2e/%1b", "\x7f"))
        for _ in range(chance.randint(0, 2)):
            headers[chance.randrange(3):3] = [chance.choice(HEADERS)]
    headers.append(f"Content-Length: {len(data)}")
    head = "\r\n".join([f"{method} {route} HTTP/1.1", *headers, "", ""]).encode("latin-1")
    whole = bytearray(head + data)
    for _ in range(chance.choice((1, 1, 2, 5)) if kind == 0 else chance.random() < 0.1):
        place = chance.randrange(min(len(whole), chance.choice((200, len(whole)))))
        match chance.randrange(4):
            case 0:
                whole[place] = chance.randrange(256)
            case 1:
                del whole[place : place + chance.choice((1, 2, 50))]
                whole += b"\n"
            case 2:
                whole[place:place] = chance.randbytes(chance.choice((1, 4, 3000)))
            case 3:
                del whole[max(place, 1) :]
    return bytes(whole)


@functools.cache
def port(bundle: Path) -> int:
    """Of a service in this process, which is there until the process is killed. Errors in its log
    are printed."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from serving.client import running

    from var_deploy.pipeline import Pipeline
    from var_deploy.serving import connections
    from var_deploy.serving.app import create_app
    from var_deploy.serving.settings import Settings

    printed = logging.StreamHandler(sys.stderr)
    printed.setLevel(logging.ERROR)
    for name in ("uvicorn", "var_deploy"):
        logging.getLogger(name).addHandler(printed)
        logging.getLogger(name).propagate = False
    connections.SWEEP = SHORT / 3
    settings = Settings(count=2, body=3_000_000, head_seconds=SHORT, body_seconds=SHORT)
    pipe = LIVE.enter_context(Pipeline.load(bundle, threads=1))
    return LIVE.enter_context(running(create_app(pipe, settings))).port


def attempt(bundle: Path, number: int | None) -> None:
    """Send the request of this number; None is for one that is valid.

    Raises UsageError where the service refuses it, and AssertionError where it answers with
    anything but a reason in one line, or is not well afterwards.
    """
    there = port(bundle)
    data = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" if number is None else request(number)
    status, body = answer(there, data)
    assert answer(there, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
    if status == 0:
        raise UsageError("closed without an answer")
    if status < 400:
        return
    # some ask for more haste than is possible
    assert status < 500 or status == 504, f"{status}: {body[:300]!r}"
    if data.startswith(b"HEAD"):
        raise UsageError(f"status {status}")
    said = json.loads(body)
    assert set(said) == {"error"}, body[:300]
    raise UsageError(said["error"])


def answer(there: int, data: bytes) -> tuple[int, bytes]:
    """Status and body; 0 where the connection is closed without them."""
    with socket.create_connection(("127.0.0.1", there), PATIENCE) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        reply = http.client.HTTPResponse(connection, method=data[:4].decode("latin-1"))
        try:
            reply.begin()
            return reply.status, reply.read()
        except (ConnectionError, http.client.BadStatusLine):
            return 0, b""
