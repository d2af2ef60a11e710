"""Around the routes: what is too large or no JSON stays outside, and every answer is counted."""

from __future__ import annotations

import json

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from var_deploy.serving.metrics import Metrics
from var_deploy.serving.settings import Settings

# of pages and their scripts: whatever a page does, it asks nobody but this service
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'",
    ),
]

ROUTES = {"/", "/health", "/metrics", "/docs", "/openapi.json", "/v1/model"}
ROUTES |= {"/v1/images", "/v1/images/stream", "/v1/edit", "/v1/edit/stream"}


class Guard:
    """ASGI middleware. A body is bounded while it is read: its announced length can be a lie."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self._app, self._limit, self._metrics = app, settings.body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0
        status = 499  # nobody was there to answer

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, self._too_large())
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            if refusal := self._refusal(scope):
                await _answer(noted, *refusal)
            else:
                await self._app(scope, bounded, noted)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.requests.labels(route=_route(scope["path"]), status=str(status)).inc()

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason where the head of a request says enough."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            return 413, self._too_large()
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # also keeps foreign web pages out: a browser lets them send forms, but no JSON
        if scope["method"] == "POST" and kind != b"application/json":
            return 415, "send JSON, with the header Content-Type: application/json"
        return None

    def _too_large(self) -> str:
        return f"the request has more than the {self._limit} bytes that this service takes"


async def _answer(send: Send, status: int, error: str) -> None:
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _route(path: str) -> str:
    """The path where it is one of ours; others share a name, or anyone could add to the metrics."""
    if path.startswith("/page/"):
        return "/page"
    return path if path in ROUTES else "other"
