"""ASGI middleware around the routes: checks request headers, counts and logs each answer."""

from __future__ import annotations

import json
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from var_deploy.serving.bodies import too_large
from var_deploy.serving.hosts import HostError, Hosts, host_of
from var_deploy.serving.log import Access, plain, write_access
from var_deploy.serving.metrics import Metrics
from var_deploy.serving.settings import Settings

# a page of the service loads scripts and sends requests only from and to this service
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'",
    ),
]

WITH_PICTURE = {"/v1/edit", "/v1/edit/stream", "/v1/vary", "/v1/vary/stream"}
ROUTES = {"/", "/health", "/metrics", "/docs", "/openapi.json", "/v1/model"}
ROUTES |= {"/v1/images", "/v1/images/stream", *WITH_PICTURE}
GONE = 499  # the client closed the connection; the status of nginx for that
IMAGES = "var_deploy.image.images"  # in a scope: how many images the answer holds


class Guard:
    """ASGI middleware: refuses foreign hosts and unsuitable bodies, handles HEAD and proxies."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._hosts = Hosts(settings.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, sent = time.monotonic(), GONE, 0
        asked, path = scope, inside(scope["path"], self._settings.root_path)
        raw_path = path.encode("utf-8", "replace")
        scope = {**scope, "path": path, "raw_path": raw_path, "root_path": ""}
        if scope["method"] == "HEAD":  # as GET, and the server leaves the body out
            scope["method"] = "GET"

        async def noted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            elif asked["method"] == "HEAD":
                message["body"] = b""
            sent += len(message.get("body", b""))
            await send(message)

        try:
            if refusal := self._refusal(scope):
                await _answer(noted, *refusal, headers=scope["headers"])
            elif target := redirection(scope["path"], asked["path"], asked["method"]):
                await noted(
                    {
                        "type": "http.response.start",
                        "status": 307,
                        "headers": [(b"location", target.encode()), (b"content-length", b"0")],
                    }
                )
                await noted({"type": "http.response.body", "body": b""})
            else:
                await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.requests.labels(route=_route(path), status=str(status)).inc()
            write_access(
                Access(
                    client=scope.get("client"),
                    method=asked["method"],
                    path=asked["path"],
                    status=status,
                    seconds=time.monotonic() - began,
                    sent=sent,
                    images=scope.get(IMAGES, 0),
                )
            )

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason where the head of a request says enough."""
        try:
            host = host_of(scope["headers"])
        except HostError as error:
            return 400, str(error)
        if not self._hosts.allow(host):
            host = plain(host)
            remedy = f"start it with --allowed-host {host}"
            return 403, f"this service does not answer as {host}; {remedy}"
        headers = dict(scope["headers"])
        length, limit = headers.get(b"content-length", b"0"), body_limit(scope, self._settings)
        if length.isdigit() and int(length[:20]) > limit:
            return 413, str(too_large(limit))
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # also keeps foreign web pages out: a browser lets them send forms, but no JSON
        if scope["method"] == "POST" and kind != b"application/json":
            return 415, "send JSON, with the header Content-Type: application/json"
        return None


def body_limit(scope: Scope, settings: Settings) -> int:
    """Return the most bytes that a body may have on this route."""
    return settings.body if scope["path"] in WITH_PICTURE else settings.plain_body


def inside(path: str, root_path: str) -> str:
    """Return the path of a route without `root_path`, for proxies that leave it in the request."""
    if root_path and _route(path) == "other" and f"{path}/".startswith(f"{root_path}/"):
        return path[len(root_path) :]
    return path


def redirection(path: str, asked: str, method: str) -> str | None:
    """Return where to redirect a path that is a route but for a slash at its end, else None.

    The target is relative, since the address in front of a proxy is unknown here.
    """
    if method not in ("GET", "HEAD", "POST"):
        return None
    if not path:
        return f"{asked.rpartition('/')[2]}/"
    if path != "/" and path.endswith("/") and path[:-1] in ROUTES:
        return f"../{path[:-1].rpartition('/')[2]}"
    return None


async def _answer(
    send: Send, status: int, error: str, headers: list[tuple[bytes, bytes]]
) -> None:
    body = json.dumps({"error": error}).encode()
    answer = [(b"content-type", b"application/json")]
    answer.append((b"content-length", str(len(body)).encode()))
    if any(name == b"expect" for name, _ in headers):  # its body will not come
        answer.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": answer})
    await send({"type": "http.response.body", "body": body})


def _route(path: str) -> str:
    """Return the path of a known route, else "other": clients must not add names to the metrics."""
    if path.startswith("/page/"):
        return "/page"
    return path if path in ROUTES else "other"
