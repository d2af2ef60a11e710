"""Connects to a Ray cluster: fails within seconds, and suppresses Ray's own output."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

import grpc  # type: ignore[import-untyped]
import ray

from var_deploy.errors import UsageError, one_line

LOCAL, AUTO, CLIENT = "local", "auto", "ray://"
PATIENCE = 5.0  # seconds; Ray waits two minutes and then ends the process
FORMS = "local, auto, HOST:PORT from a node of the cluster, or ray://HOST:10001 from elsewhere"
# set before Ray starts: no usage statistics, no advice on accelerators, and more than five seconds
# for a proxy of Ray Serve to start, which is too short on a busy machine
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to the Ray cluster at `address` for the time of the block.

    "local" starts a cluster on this machine, which ends with the block. The other forms connect to
    a running cluster: "auto" to the one in RAY_ADDRESS or on this machine, "host:port" from a node
    of the cluster, "ray://host:port" from another machine. Actors of this process end with the
    block.

    Raises UsageError, within seconds, where no Ray runs at the address, or where its version of Ray
    or Python differs from the ones here.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS") or AUTO
    if address not in (LOCAL, AUTO):
        _check_reachable(address)
    # the port of the dashboard is looked at only where Ray is started
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    stdout, stderr = _WithoutRay(sys.stdout), _WithoutRay(sys.stderr)
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            with _in_folder(sys.prefix):  # workers look for modules where Ray was started
                ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except (OSError, RuntimeError, ValueError, SystemExit) as error:
            with contextlib.suppress(Exception):
                ray.shutdown()
            raise UsageError(_refusal(address, error)) from None
        try:
            yield
        finally:
            with contextlib.redirect_stdout(io.StringIO()):  # drop its delayed output
                ray.shutdown()


@contextlib.contextmanager
def _in_folder(folder: str) -> Iterator[None]:
    """Change the current folder for the block, as `contextlib.chdir` of Python 3.11 does."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _check_reachable(address: str) -> None:
    """Raise UsageError where no server listens at the address, or one that is not Ray."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise UsageError(f"{address!r} is not an address of a Ray cluster; write {FORMS}")
    place = f"{host}:{port}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UsageError(f"no Ray runs at {place} ({reason}); write {FORMS}") from None
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # with its certificates, which Ray reads
    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=PATIENCE)
        except grpc.FutureTimeoutError:
            raise UsageError(
                f"the server at {place} is not Ray; write {FORMS}; the default port is 6379"
            ) from None


def _refusal(address: str, error: BaseException) -> str:
    """The error message, in one line, for an exception of `ray.init`."""
    reason = one_line(error)
    if "version" in reason.lower() and "mismatch" in reason.lower():
        return (
            f"the cluster at {address} and this machine differ: {reason}; install the same Ray "
            "and Python on both"
        )
    if address == AUTO:
        return f"no Ray runs on this machine, and RAY_ADDRESS names none; write {FORMS}"
    if address == LOCAL:
        return f"Ray cannot be started here: {reason}"
    return f"the Ray cluster at {address} cannot be joined ({reason}); write {FORMS}"


class _WithoutRay(io.TextIOBase):
    """A stream that drops the output of Ray's threads, such as the log of a node that ended."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()
