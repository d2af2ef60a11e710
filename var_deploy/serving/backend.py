"""Between the HTTP side and what generates: a `GenerationRequest` goes in, events come out.

    VarDeployError
    └── RefusedError      not drawn, for a reason that lies in the service; carries the HTTP status
        ├── BusyError     429: the queue is full
        ├── StoppingError 503: the service finishes what it has and takes nothing new
        └── LateError     504: the deadline passed before anything could be drawn
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from var_deploy.config import Loaded
from var_deploy.errors import VarDeployError
from var_deploy.image.editing import Edit, Variation
from var_deploy.manifest import Manifest
from var_deploy.runtime.request import Request


class RefusedError(VarDeployError):
    """The service does not draw this now. `retry_after` is in seconds, None where that is moot."""

    status = 503

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BusyError(RefusedError):
    """The queue is full."""

    status = 429


class StoppingError(RefusedError):
    """The service is being stopped."""


class LateError(RefusedError):
    """The deadline came before the request's turn."""

    status = 504


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """Images that somebody waits for. Plain data: it can travel to another process.

    Attributes:
        request: labels, streams and settings, all of them valid; tokens to keep and features of
            prompts are not there yet.
        prompts: one per image, of a bundle that takes prompts; else empty.
        negative: what all of the images are guided away from; "" for nothing.
        edit: the picture that the images start from; None for images from nothing.
        previews: whether the images are wanted after each scale as well.
        deadline: seconds from now on.
    """

    request: Request
    prompts: tuple[str, ...] = ()
    negative: str = ""
    edit: Edit | Variation | None = None
    previews: bool = False
    deadline: float | None = None

    @property
    def count(self) -> int:
        return len(self.request.labels)


@dataclass(frozen=True, kw_only=True)
class Queued:
    """Always the first event, and again whenever the queue has moved."""

    position: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleDone:
    """A scale is done, of the images from number `first` on: uint8 [n, side, side, C]."""

    scale: int
    scales: int
    first: int
    images: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """The last event: uint8 [N, side, side, C], and the scales [N] that each is made of."""

    images: NDArray[np.uint8]
    scales_done: NDArray[np.int64]


Event = Queued | ScaleDone | Drawn


class Backend(Protocol):
    """What draws. The service needs no more than this."""

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that is drawn with."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether new work is refused."""
        ...

    def describe(self) -> Loaded:
        """As `Pipeline.describe`."""
        ...

    def draw(self, work: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Queued, then ScaleDone where `work.previews`, then Drawn.

        Closing the generator gives the place back; what is drawn for nobody else is stopped.
        Raises RefusedError, and what `Pipeline.draw` raises.
        """
        ...

    async def stop(self) -> None:
        """Refuse new work and return once all that was taken is done."""
        ...

    def abort(self) -> None:
        """Refuse new work and drop what was taken, with StoppingError. From any thread."""
        ...
