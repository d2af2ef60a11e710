"""What an operator sets: how much a service takes on."""

from __future__ import annotations

from dataclasses import dataclass

from var_deploy.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of a service.

    Attributes:
        queue: requests that may wait; the next one is told to come back later.
        count: images a request may ask for.
        pixels: of a picture that is sent.
        body: bytes of a request.
    """

    queue: int = 64
    count: int = 16
    pixels: int = 25_000_000
    body: int = 32_000_000

    def __post_init__(self) -> None:
        for name in ("queue", "count", "pixels", "body"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
