"""Settings of the HTTP service: its limits, and the hosts that it answers."""

from __future__ import annotations

from dataclasses import dataclass

from var_deploy.errors import UsageError
from var_deploy.serving.hosts import validate_host

PLAIN_BODY = 65536  # bytes of a request without a picture
PER_IMAGE = 64  # bytes that a request may take for each image's label and seed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of a service.

    Attributes:
        queue: most requests that wait; a further one gets status 429.
        count: most images per request.
        pixels: most pixels of a picture in a request.
        prompt: most characters of a prompt.
        body: most bytes of a request with a picture.
        connections: most open connections; a further one gets status 503.
        hosts: names in a `Host` header that are answered besides IP addresses and localhost:
            "images.example.org", "*.example.org" for every name below it, "*" for all names.
        root_path: the path of a proxy below which the service is found, as in "/images".
        head_seconds: in which the head of a request must have come.
        body_seconds, body_rate: a body must have come `body_seconds` after its head, and each
            `body_rate` bytes of it allow one second more.
        read_seconds, read_rate: the same for a client that reads an answer.
    """

    queue: int = 64
    count: int = 16
    pixels: int = 25_000_000
    prompt: int = 4000
    body: int = 32_000_000
    connections: int = 512
    hosts: tuple[str, ...] = ()
    root_path: str = ""
    head_seconds: float = 15
    body_seconds: float = 20
    body_rate: int = 100_000
    read_seconds: float = 30
    read_rate: int = 10_000

    def __post_init__(self) -> None:
        for name in ("queue", "count", "pixels", "prompt", "body", "connections"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        for host in self.hosts:
            validate_host(host)
        root = self.root_path
        if root and (not root.startswith("/") or root.endswith("/") or not root.isprintable()):
            raise UsageError(
                f"the root path must start with / and not end with it, as in /images, "
                f"found {root!r}"
            )

    @property
    def plain_body(self) -> int:
        """Most bytes of a request without a picture."""
        return min(self.body, max(PLAIN_BODY, PER_IMAGE * self.count))

    @property
    def bodies(self) -> int:
        """Most bytes of all bodies in memory at a time, beyond `plain_body` of each."""
        return self.body + self.body // 4
