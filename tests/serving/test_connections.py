"""Clients that hold a connection open for nothing: each wait has an end, and their number too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving.client import PATIENCE, Client

pytest.importorskip("fastapi", reason="the extra serve is not installed")

HEAD = "POST /v1/edit HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SHORT = 0.3  # seconds

Opens = Callable[[Client], socket.socket]


@pytest.fixture
def opens() -> Iterator[Opens]:
    """Opens connections to a service, which are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda client: stack.enter_context(
            socket.create_connection(("127.0.0.1", client.port), PATIENCE)
        )


def answer(connection: socket.socket) -> tuple[int, str, bytes]:
    """Status, head and body of all that comes until the service closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int((head.split() or [b"", b"0"])[1]), head.decode().lower(), body


def error_of(body: bytes) -> str:
    said = json.loads(body)
    assert set(said) == {"error"}
    return str(said["error"])


@pytest.mark.parametrize("sent", ["G", "GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_a_head_that_does_not_end(start: Any, opens: Opens, sent: str) -> None:
    client: Client = start(head_seconds=SHORT)
    connection = opens(client)
    connection.sendall(sent.encode())
    status, head, body = answer(connection)
    assert status == 408 and "connection: close" in head
    assert "did not come in 0.3 s" in error_of(body)


def test_a_head_that_drips(start: Any, opens: Opens) -> None:
    """Each byte comes quickly, and the whole never does."""
    client: Client = start(head_seconds=SHORT)
    connection = opens(client)
    end = time.monotonic() + PATIENCE
    with pytest.raises(OSError):
        while time.monotonic() < end:
            connection.sendall(b"G")
            time.sleep(0.02)


def test_a_connection_without_a_request_is_closed(start: Any, opens: Opens) -> None:
    client: Client = start(head_seconds=SHORT)
    assert answer(opens(client)) == (0, "", b"")


@pytest.mark.parametrize("sent", ["", '{"image": "', "drip"])
def test_a_body_that_does_not_end(start: Any, opens: Opens, sent: str) -> None:
    client: Client = start(body_seconds=SHORT, body_rate=10**9)
    connection = opens(client)
    connection.sendall((HEAD + "Content-Length: 90000\r\n\r\n").encode())
    if sent == "drip":
        end = time.monotonic() + 4 * SHORT
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                connection.sendall(b" ")
                time.sleep(0.02)
    else:
        connection.sendall(sent.encode())
    status, head, body = answer(connection)
    if sent != "drip" or status:  # who still sends may find the connection reset
        assert status == 408 and "connection: close" in head
        assert "did not come in time" in error_of(body)
    client.wait_for('var_deploy_requests_total{route="/v1/edit",status="408"}', 1)


def test_a_body_that_stops_half_way_gives_its_memory_back(start: Any, opens: Opens) -> None:
    """Otherwise the next would find no room."""
    client: Client = start(body=1_000_000)
    for number in range(3):
        connection = opens(client)
        connection.sendall((HEAD + "Content-Length: 900000\r\n\r\n").encode() + b" " * 800_000)
        connection.close()
        client.wait_for('var_deploy_requests_total{route="/v1/edit",status="499"}', number + 1)
    reply = client.ask("POST", "/v1/edit", b" " * 900_000)
    assert reply.status == 413 and "besides its pictures" in reply.error  # it was read


def test_all_bodies_together_are_bounded(start: Any, opens: Opens) -> None:
    client: Client = start(body=1_000_000)
    connections = [opens(client) for _ in range(4)]
    for connection in connections:
        connection.sendall((HEAD + "Content-Length: 900000\r\n\r\n").encode() + b" " * 800_000)
    client.wait_for('var_deploy_requests_total{route="/v1/edit",status="503"}', 3)
    assert client.post("/v1/images", {"labels": [0]}).status == 200  # small ones have room
    refused = client.ask("POST", "/v1/edit", b" " * 900_000)
    assert refused.status == 503 and "Retry-After".lower() in refused.headers
    assert "other pictures" in refused.error


def test_who_is_one_too_many_is_told_so(start: Any, opens: Opens) -> None:
    client: Client = start(connections=3)
    busy = [opens(client) for _ in range(3)]
    for connection in busy:  # their heads are whole, so they are not closed for a newcomer
        connection.sendall((HEAD + "Content-Length: 90000\r\n\r\n").encode())
        connection.settimeout(SHORT)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    status, head, body = answer(opens(client))
    assert status == 503 and "retry-after: 2" in head
    assert "too many connections" in error_of(body)
    for connection in busy:
        connection.close()
    client.wait_for('var_deploy_requests_total{route="/v1/edit",status="499"}', 3)


def test_a_newcomer_takes_the_place_of_who_sends_nothing(start: Any, opens: Opens) -> None:
    client: Client = start(connections=3)
    idle = [opens(client) for _ in range(3)]
    time.sleep(1.5)  # a while is left to each
    assert client.get("/health").status == 200
    assert answer(idle[0]) == (0, "", b"")  # the one that waited longest


def test_too_small_chunks(start: Any, opens: Opens) -> None:
    """They take ever so long to parse: 100 000 characters are sent in as many chunks."""
    client: Client = start()
    connection = opens(client)
    connection.sendall((HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode())
    with contextlib.suppress(OSError):
        connection.sendall(b"1\r\nx\r\n" * 90_000)
    status, _, body = answer(connection)
    if status:
        assert status == 400 and "too many small chunks" in error_of(body)
    client.wait_for('var_deploy_requests_total{route="/v1/edit",status="499"}', 1)


def test_a_refusal_is_read_although_the_body_still_comes(service: Client) -> None:
    """No reset in the middle of it: the rest of the body is skipped."""
    reply = service.ask("POST", "/v1/images", b"x" * 150_000)
    assert reply.status == 413 and reply.error


def test_who_does_not_read_an_answer(start: Any, opens: Opens) -> None:
    client: Client = start(read_seconds=SHORT)
    connection = opens(client)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection.settimeout(SHORT)
    end = time.monotonic() + PATIENCE
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while time.monotonic() < end:  # until the answers fill all buffers, and the end comes
            with contextlib.suppress(TimeoutError):
                connection.sendall(ask * 100)


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", b"\0" * 99999])
def test_what_is_no_http(service: Client, opens: Opens, sent: bytes) -> None:
    connection = opens(service)
    with contextlib.suppress(OSError):
        connection.sendall(sent + b"\r\n\r\n")
    status, _, body = answer(connection)
    if status:
        assert status == 400 and "HTTP" in error_of(body)
    assert service.get("/health").status == 200


def test_nonsense_behind_a_request(service: Client, opens: Opens) -> None:
    """It is refused in the place of the answer, which for HEAD has no body."""
    for method, has_body in (("HEAD", False), ("GET", True)):
        connection = opens(service)
        head = f"{method} /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}\r\nno size\r\n".encode())
        status, _, body = answer(connection)
        assert (status, bool(body)) == (400, has_body)


def test_one_connection_does_not_stop_the_look_at_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from var_deploy.serving import connections

    monkeypatch.setattr(connections, "SWEEP", 0)
    ended: list[str] = []

    class Fake(connections.Connection):
        def __init__(self, name: str) -> None:
            self.name, self.transport = name, self

        def check(self, now: float) -> None:
            if self.name == "bad":
                raise OSError("the endpoint is not connected")
            ended.append("checked")

        def abort(self) -> None:
            ended.append("aborted")

    async def look() -> None:
        looking = asyncio.ensure_future(connections.sweep([Fake("bad"), Fake("good")]))
        while len(ended) < 4:
            await asyncio.sleep(0)
        looking.cancel()

    asyncio.run(look())
    assert ended[:4] == ["aborted", "checked"] * 2


def test_who_goes_while_a_refusal_is_written(start: Any, opens: Opens) -> None:
    """Resets at the moment of the refusal; whoever comes later is looked at nevertheless."""
    client: Client = start(head_seconds=SHORT)
    for number in range(12):
        connection = opens(client)
        connection.sendall(b"GET")
        time.sleep(SHORT + 0.05 * number)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    last = opens(client)
    last.sendall(b"GET")
    assert answer(last)[0] == 408


def test_an_upgrade_is_not_one(service: Client) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    assert service.ask("GET", "/health", None, headers).json == {"status": "ok"}
