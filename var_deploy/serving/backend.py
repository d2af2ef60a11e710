"""The interface between HTTP and generation: a `GenerationRequest` goes in, events come out.

    VarDeployError
    └── RefusedError      the service cannot take the request now; carries the HTTP status
        ├── BusyError     429: the queue is full
        ├── StoppingError 503: the service is stopping; it finishes accepted requests only
        └── LateError     504: the deadline passed before the first scale
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
    """The service cannot take a request now.

    `retry_after` is in seconds, None where a retry would not help.
    """

    status = 503

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BusyError(RefusedError):
    """The queue is full (HTTP status 429)."""

    status = 429


class StoppingError(RefusedError):
    """The service is stopping (HTTP status 503)."""


class LateError(RefusedError):
    """The deadline passed while the request was waiting (HTTP status 504)."""

    status = 504


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """A validated request for images. Plain data: it can be sent to another process.

    Attributes:
        request: labels, random-number keys and settings. Tokens to keep and features of prompts
            are computed later, by the backend.
        prompts: one per image, of a bundle that takes prompts; else empty.
        negative: the prompt that all images are guided away from; "" for none.
        edit: the picture that the images start from; None for new images.
        previews: whether to send a preview after each scale.
        deadline: seconds from the acceptance of the request; None without one.
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
    """Event: the request waits at this position of the queue.

    Always the first event, and sent again whenever the position changes.
    """

    position: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleDone:
    """Event: a scale is done. `images` uint8 [n, H, W, C] are those from number `first` on."""

    scale: int
    scales: int
    first: int
    images: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """The last event: the images, uint8 [N, H, W, C], the number of scales [N] of each, what there
    is to say of the prompts, and their words that are not known; see `Pipeline.remarks`."""

    images: NDArray[np.uint8]
    scales_done: NDArray[np.int64]
    remarks: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


Event = Queued | ScaleDone | Drawn


class Backend(Protocol):
    """Generates the images of requests: the interface that the HTTP service needs."""

    @property
    def manifest(self) -> Manifest:
        """Manifest of the bundle that generates the images."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        ...

    def describe(self) -> Loaded:
        """Return what runs the bundle, see `Pipeline.describe`."""
        ...

    def draw(self, work: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate images: yields Queued, ScaleDone per scale with `work.previews`, then Drawn.

        Closing the generator withdraws the request, and stops a batch that no other client waits
        for. Raises RefusedError, and the errors of `Pipeline.draw`.
        """
        ...

    async def stop(self) -> None:
        """Refuse new requests and return once all accepted ones are done."""
        ...

    def abort(self) -> None:
        """Refuse new requests and end the accepted ones with StoppingError. From any thread."""
        ...
