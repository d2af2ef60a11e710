"""The answer to each error: an HTTP status, and one line in JSON."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from var_deploy.errors import BundleError, CancelledError, UsageError, VarDeployError, one_line
from var_deploy.serving.backend import RefusedError
from var_deploy.serving.bodies import BodyTooLargeError, BodyTooSlowError
from var_deploy.serving.events import GoneError
from var_deploy.serving.guard import GONE
from var_deploy.serving.log import log
from var_deploy.serving.validate import TooLargeError

LONGEST_ERROR = 500  # characters: a message may repeat what was sent
BROKEN = "internal error; the server's log says more"
UNUSABLE = "the bundle cannot be used as it is; the server's log says more"
# from a slash or a drive on, where a word begins; what stands behind the last slash is kept
PATH = re.compile(r"""(?<![^\s'"(\[=:,])(?:[A-Za-z]:)?[\\/](?:[^\s'":,;]*[\\/])?""")


def add_handlers(app: FastAPI) -> None:
    """Add the exception handlers of this module to an application."""
    handlers: tuple[tuple[type[Exception], Any], ...] = (
        (VarDeployError, _refused),
        (GoneError, _gone),
        (HTTPException, _http_error),
        (Exception, _broken),
    )
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def _line(text: str) -> str:
    """One short line of printable characters: it may repeat what was sent, and meet a terminal."""
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST_ERROR else text[:LONGEST_ERROR] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _status(error: VarDeployError) -> int:
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, (TooLargeError, BodyTooLargeError)):
        return 413
    if isinstance(error, BodyTooSlowError):
        return 408
    if isinstance(error, UsageError):
        return 400
    return 503 if isinstance(error, CancelledError) else 500


def reason(error: VarDeployError) -> str:
    """Return the message for the client. An internal error is logged in full, and its message here
    has no paths."""
    if _status(error) != 500:
        return _line(str(error))
    log.error("%s: %s", type(error).__name__, one_line(error))
    return UNUSABLE if isinstance(error, BundleError) else _line(PATH.sub("", str(error)))


async def _refused(request: Request, error: VarDeployError) -> Response:
    headers = {}
    if isinstance(error, RefusedError) and error.retry_after is not None:
        headers = {"Retry-After": str(error.retry_after)}
    if isinstance(error, BodyTooSlowError):
        headers = {"Connection": "close"}
    return JSONResponse({"error": reason(error)}, _status(error), headers)


async def _gone(request: Request, error: GoneError) -> Response:
    return Response(status_code=GONE)  # the client is gone


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": _line(str(error.detail))}, error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    """Answer an unexpected error with status 500; the server logs its traceback."""
    return JSONResponse({"error": BROKEN}, 500)
