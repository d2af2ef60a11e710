"""Runs the service on a socket until a signal stops it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from var_deploy.errors import UsageError
from var_deploy.serving.connections import protocol_for, sweep

FLUSH = 10  # seconds in which the last answers must have left


class Server(uvicorn.Server):
    """The HTTP server. Signals stop it in three stages.

    The first signal refuses new requests and finishes the accepted ones, the second drops these,
    the third ends the server at once.
    """

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                # uvicorn would else take what happens to be installed, which has no time-outs
                http=protocol_for(app.state.settings),
                loop="asyncio",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,  # Guard has one
                server_header=False,
                timeout_graceful_shutdown=FLUSH,
            )
        )
        self._backend = app.state.backend
        self._signals = 0
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        sweeping = asyncio.ensure_future(sweep(self.server_state.connections))
        try:
            await super().serve(sockets)
        finally:
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping

    def stop(self) -> None:
        """Handle a signal: go to the next stage of stopping. May be called from any thread."""
        self._signals += 1
        if self._signals == 1:
            self._loop.call_soon_threadsafe(self._begin_stop)
        elif self._signals == 2:
            # not from here: a signal may find the main thread inside of the backend's lock
            self._loop.call_soon_threadsafe(self._backend.abort)
        else:
            self.force_exit = self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    def _begin_stop(self) -> None:
        self._stopping = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await self._backend.stop()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes any free port.

    `::` means all addresses, including those of IPv4 where the system supports both on one socket.
    Raises UsageError where the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(
            address[:2], family=family, backlog=2048, dualstack_ipv6=both
        )
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from None


def address_of(listening: socket.socket) -> str:
    """Return the URL of a listening socket, see `url_of`."""
    return url_of(*listening.getsockname()[:2])


def url_of(host: str, port: int) -> str:
    """Return http://host:port, with the brackets that an IPv6 address needs."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
