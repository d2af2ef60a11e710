"""What a service must not swallow: each is a 4xx with one line that says why."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from serving.client import JSON, Client, picture

pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROUTE = "/v1/images"
BODIES = {ROUTE: 65536, f"{ROUTE}/stream": 65536, "/v1/edit": 100_000, "/v1/edit/stream": 100_000}
TINY = picture(np.zeros((8, 8, 3), np.uint8))


def png_of_size(width: int, height: int, rows: int = 0) -> str:
    """A PNG that says to be this large, with some rows of zeros, as base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    squeezed = zlib.compress(bytes((width + 1) * rows), 9)
    stream = io.BytesIO()
    stream.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", squeezed))
    stream.write(chunk(b"IEND", b""))
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"labels": ["../../etc/passwd"]}, "no class is called '../../etc/passwd'"),
        ({"labels": ["stra"]}, "did you mean star?"),
        ({"labels": [5]}, "the model has 0 to 4"),
        ({"labels": [-1]}, "the model has 0 to 4"),
        ({"labels": []}, "labels is empty"),
        ({"labels": "star"}, "labels: "),
        ({"labels": [True]}, "labels: "),
        ({"seed": [None]}, "seed: "),
        ({"labels": ["\ud800"]}, "no class is called"),
        ({"labels": ["x" * 9000]}, "no class is called 'xxx"),
        ({"labels": [0, 1, 2, 3, 4, 0, 1]}, "count must lie between 1 and 6, found 7"),
        ({"count": 0}, "count must lie between 1 and 6"),
        ({"count": 10**9}, "count must lie between 1 and 6"),
        ({"count": 2.5}, "count: "),
        ({"seed": -1}, "seed must lie between 0 and 2**64 - 1"),
        ({"seed": 2**64}, "seed must lie between 0 and 2**64 - 1"),
        ({"seed": "7"}, "seed: "),
        ({"seed": []}, "seed is empty"),
        ({"seed": [1, 2], "count": 3}, "2 seeds for 3 images: give one, which"),
        ({"cfg": -1}, "cfg must lie between"),
        ({"cfg": float("nan")}, "cfg must lie between"),
        ({"cfg": [1, 2]}, "cfg has 2 values, but the model has 3 scales"),
        ({"top_k": 1.5}, "top_k: "),
        ({"top_p": 2}, "top_p must lie between 0 and 1"),
        ({"temperature": 0}, "temperature must lie between"),
        ({"temperature": True}, "temperature: "),
        ({"deadline": 0}, "deadline must be a number of seconds above 0"),
        ({"deadline": float("inf")}, "deadline must be a number of seconds above 0"),
        ({"deadline": "soon"}, "deadline: "),
        ({"format": "gif"}, "format: "),
        ({"lables": ["star"]}, "lables: "),
        (["star"], "the body: "),
        (None, "the body: "),
    ],
)
def test_values_that_make_no_sense(service: Client, body: Any, part: str) -> None:
    for route in (ROUTE, f"{ROUTE}/stream"):
        reply = service.post(route, body)
        assert reply.status == 400, reply.data
        assert part in reply.error
        assert len(reply.error) <= 501


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b'{"seed": 1' + b"0" * 5000 + b"}", b"[" * 50_000, b'{"a": 1} {}'],
)
def test_bodies_that_are_no_json(service: Client, data: bytes) -> None:
    reply = service.ask("POST", ROUTE, data)
    assert reply.status == 400 and reply.error


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_what_a_form_of_another_site_could_send(service: Client, kind: str) -> None:
    reply = service.ask("POST", ROUTE, b"{}", {"Content-Type": kind} if kind else {})
    assert reply.status == 415 and "application/json" in reply.error


@pytest.mark.parametrize(("route", "most"), BODIES.items())
def test_a_body_that_says_to_be_too_large_is_not_read(
    service: Client, route: str, most: int
) -> None:
    reply = service.ask("POST", route, None, {**JSON, "Content-Length": str(most + 1)})
    assert reply.status == 413 and f"the {most} bytes" in reply.error


@pytest.mark.parametrize(("route", "most"), BODIES.items())
def test_a_body_of_unknown_length_is_bounded_too(service: Client, route: str, most: int) -> None:
    connection = service.connect()
    parts = [b'{"labels": ["', *[b"x" * 50_000] * 3, b'"]}']
    connection.request("POST", route, iter(parts), JSON, encode_chunked=True)
    reply = connection.getresponse()
    assert reply.status == 413 and f"the {most} bytes" in json.loads(reply.read())["error"]
    connection.close()


@pytest.mark.parametrize(
    ("size", "part"),
    [
        ((10_000, 10_000), "more than the 10000 pixels"),  # 100 megapixels
        ((30_000, 30_000), "more than the 10000 pixels"),  # and what Pillow calls a bomb
        ((101, 100), "more than the 10000 pixels"),
    ],
)
@pytest.mark.parametrize("field", ["image", "mask"])
def test_pictures_of_too_many_pixels(
    service: Client, field: str, size: tuple[int, int], part: str
) -> None:
    body = {"image": TINY, "box": [0, 0, 4, 4], field: png_of_size(*size)}
    if field == "mask":
        del body["box"]
    reply = service.post("/v1/edit", body)
    assert reply.status == 413 and part in reply.error


def test_a_bomb_is_not_unpacked(service: Client) -> None:
    """90 kB that say to be small and hold 64 MB of rows: no more than it says is read."""
    bomb = png_of_size(100, 100, rows=640_000)
    assert len(bomb) < 95_000
    reply = service.post("/v1/edit", {"image": bomb, "box": [0, 0, 50, 50]})
    assert reply.status in (200, 400)


@pytest.mark.parametrize(
    "image",
    [
        "/etc/passwd",
        "",
        "é",
        "data:image/png;base64,",
        base64.b64encode(b"no picture").decode(),
        base64.b64encode(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;").decode(),
        png_of_size(50, 50),  # without a row
        TINY[: len(TINY) // 2 // 4 * 4],
    ],
)
def test_what_is_no_picture(service: Client, image: str) -> None:
    reply = service.post("/v1/edit", {"image": image, "box": [0, 0, 4, 4]})
    assert reply.status == 400 and "the picture" in reply.error


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/page/%2e%2e/app.py", 404),
        ("GET", ROUTE, 405),
        ("DELETE", "/v1/model", 405),
    ],
)
def test_routes_that_are_none(service: Client, method: str, path: str, status: int) -> None:
    reply = service.ask(method, path)
    assert reply.status == status and reply.error


def test_the_service_is_as_well_as_before(service: Client) -> None:
    assert service.post(ROUTE, {"labels": ["star"]}).status == 200
