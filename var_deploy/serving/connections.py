"""Bounds on HTTP connections: how many may be open, and how long each may wait.

uvicorn's protocol waits for the head of a request, for its body and for the reader of an answer as
long as the client likes. `Connection` adds what is missing, and `sweep` looks at all of them from
time to time:

    opened ─► head ─► body ─► (the application works) ─► answer ─► next head, or closed
              408     408                                closed

A body that the application reads is bounded there, in `bodies`; one that was refused unread is
skipped here, so that the client gets to read the refusal.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from var_deploy.serving.log import Access, log, write_access
from var_deploy.serving.settings import Settings

SWEEP = 0.5  # seconds between two looks at all connections
LINGER = 2.0  # seconds in which a client takes note that its connection ends
FRESH = 1.0  # seconds in which a connection is not closed to make room for another
LARGE, SMALL = 65536, 4096  # bytes of one read; parsing small chunks takes long
CHUNKS = 4096  # of a body, whatever their size; beyond, SPARSE bytes each
SPARSE = 256
RETRY_AFTER = 2  # seconds


class _Parser(h11.Connection):
    """Counts the pieces of a body."""

    pieces = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Data):
            self.pieces += 1
        return event


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """An HTTP connection with time limits. `settings` is set on a subclass, see `protocol_for`."""

    settings = Settings()
    _buffer = memoryview(bytearray(LARGE))  # of all connections: what is read is copied at once

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = self._parser = _Parser(h11.SERVER)
        self._phase: object = h11.IDLE  # what h11 says of the client
        self._since = time.monotonic()  # beginning of the phase
        self._received = 0  # bytes of the phase
        self._ending: float | None = None  # since when nothing but the end is awaited
        self._unsent, self._unsent_since = 0, self._since

    # of asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        open_now = len(self.connections)
        if open_now > 2 * self.settings.connections:
            transport.abort()  # not even an answer
        elif open_now > self.settings.connections and not self._make_room():
            self._refuse(503, "too many connections are open; come back later")

    def get_buffer(self, sizehint: int) -> memoryview:
        plain = self.conn.their_state is h11.SEND_BODY and not self._chunked()
        return self._buffer[: LARGE if plain else SMALL]

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._ending is not None:
            return
        self._received += len(data)
        super().data_received(data)
        self._look_at_phase()
        if self._parser.pieces > CHUNKS + self._received // SPARSE:
            self._refuse(400, "the body comes in too many small chunks")

    # of uvicorn

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look_at_phase(answered=True)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not an HTTP request that can be understood")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unsent_since = time.monotonic()

    def shutdown(self) -> None:
        if self._ending is not None:
            self.transport.close()
        else:
            super().shutdown()

    # what is added

    def check(self, now: float) -> None:
        """Close the connection if the client has taken too long."""
        limits = self.settings
        if self._reads_too_slowly(now):
            self.transport.abort()
        elif self._ending is not None or self.transport.is_closing():
            self._ending = now if self._ending is None else self._ending
            if now - self._ending > LINGER and not self._unsent:
                self.transport.abort()
        elif self._waits_for_head and now - self._since > limits.head_seconds:
            if self._received:
                self._refuse(408, f"the request did not come in {limits.head_seconds:g} s")
            else:
                self.transport.close()
        elif self._skips_body:
            late = now - self._since > limits.body_seconds + self._received / limits.body_rate
            if late or self._received > 2 * limits.body:
                self.transport.abort()

    @property
    def _waits_for_head(self) -> bool:
        return self._phase is h11.IDLE

    @property
    def _skips_body(self) -> bool:
        """Whether the client still sends what has been answered already."""
        return (
            self._phase is h11.SEND_BODY
            and self.cycle is not None
            and self.cycle.response_complete
        )

    def _chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers or ())

    def _look_at_phase(self, answered: bool = False) -> None:
        phase = self.conn.their_state
        if phase is not self._phase or answered:
            self._phase, self._since, self._received = phase, time.monotonic(), 0
            self._parser.pieces = 0

    def _reads_too_slowly(self, now: float) -> bool:
        """Whether what waits to be sent, all of an answer's rest, does not become less in time."""
        unsent = self.transport.get_write_buffer_size()
        if not self.flow.write_paused and not self.transport.is_closing():
            unsent = 0  # the application may add to it, and notice by itself
        took = self._unsent - unsent
        if not unsent or took < 0 or took > self.settings.read_rate * self.settings.read_seconds:
            self._unsent, self._unsent_since = unsent, now  # more was written, or much was read
            return False
        return now - self._unsent_since > self.settings.read_seconds

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for a request. False where there is none."""
        waiting = [c for c in self.connections if isinstance(c, Connection) and c is not self]
        waiting = [c for c in waiting if c._waits_for_head and c._ending is None]
        oldest = min(waiting, key=lambda c: c._since, default=None)
        if oldest is None or time.monotonic() - oldest._since < FRESH:
            return False
        oldest._ending = oldest._since  # closed, and gone with the next look at the latest
        oldest.transport.close()
        return True

    def _refuse(self, status: int, error: str) -> None:
        """Answer, if the application has not begun to, and close once the client has seen it."""
        if self._ending is not None:
            return
        self._ending = time.monotonic()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application need not go on, and says so in the log
            self.cycle.message_event.set()
        else:
            seconds = self._ending - self._since
            write_access(Access(client=self.client, status=status, seconds=seconds))
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps({"error": error}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        headers["Connection"] = "close"
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(RETRY_AFTER)
        phrase = HTTPStatus(status).phrase
        head = h11.Response(status_code=status, headers=list(headers.items()), reason=phrase)
        # what follows a HEAD request may be refused before that is answered
        bare = self._phase is not h11.IDLE and self.scope["method"] == "HEAD"
        for event in (head, *([] if bare else [h11.Data(data=body)]), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        # closing for good now would discard the answer where the client still sends
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except (OSError, NotImplementedError):  # the client has just gone, or the kind has none
            self.transport.close()


def protocol_for(settings: Settings) -> type[Connection]:
    """Return the class of connections for a server with these settings."""
    return type("Connection", (Connection,), {"settings": settings})


async def sweep(connections: Iterable[Any]) -> None:
    """Check all connections every SWEEP seconds, until cancelled."""
    while True:
        await asyncio.sleep(SWEEP)
        now = time.monotonic()
        for connection in list(connections):
            if isinstance(connection, Connection):
                try:
                    connection.check(now)
                except Exception:  # of one connection, which is no reason to leave out the others
                    log.exception("a connection could not be checked")
                    connection.transport.abort()
