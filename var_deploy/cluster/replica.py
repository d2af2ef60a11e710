"""The deployment that generates images on Ray Serve: one pipeline per replica, in batches."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ray import serve

from var_deploy.cluster.place import BundleSource
from var_deploy.config import Loaded, RuntimeConfig
from var_deploy.errors import CancelledError, VarDeployError
from var_deploy.serving.backend import Drawn, Event, GenerationRequest
from var_deploy.serving.batches import BatchRunner, PendingRequest, gather

SOON = 1e-3  # seconds that a request keeps when its deadline passed in transit


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Event: the generation of a request's first images begins."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Event for the metrics: a batch is done. Sent to one of the requests in the batch."""

    images: int
    seconds: float


Item = Event | Begun | Batch | VarDeployError


class RemoteRequest(PendingRequest):
    """A request from the ingress, in another process, to which its events are streamed."""

    def __init__(self, work: GenerationRequest) -> None:
        super().__init__(work)
        self._items: asyncio.Queue[Item | Exception] = asyncio.Queue()

    def tell(self, event: Item | Exception) -> None:
        self._put(self._items, event)

    async def items(self) -> AsyncGenerator[Item, None]:
        """Iterate over the events, up to the images or the error. Re-raises unexpected errors."""
        while True:
            item = await self._items.get()
            if isinstance(item, Exception) and not isinstance(item, VarDeployError):
                raise item
            yield item
            if isinstance(item, Drawn | VarDeployError):
                return


class Replica:
    """Generates the images of requests with a pipeline of its own.

    Args:
        cores: CPU threads of this replica, used where it runs on the CPU.
    """

    def __init__(self, source: BundleSource, config: RuntimeConfig, cores: int) -> None:
        self._pipeline = source.open(config, cores)
        self._batches = BatchRunner(self._pipeline)
        self._requests: list[RemoteRequest] = []  # in order of arrival
        turn: Any = self._turn  # its types lack the methods that `serve.batch` adds
        turn.set_max_batch_size(self._pipeline.manifest.batch)

    def describe(self) -> Loaded:
        return self._pipeline.describe()

    async def draw(self, work: GenerationRequest, end: float | None) -> AsyncGenerator[Item, None]:
        """Generate the images of a request: yields Begun, Batch and events, then Drawn or an error.

        `end` is the deadline on the clock of `time.time`, which the nodes share, so that the time
        in transit counts.
        """
        if end is not None:
            work = dataclasses.replace(work, deadline=max(end - time.time(), SOON))
        request = RemoteRequest(work)
        self._requests.append(request)
        turn = asyncio.ensure_future(self._turn(request))
        try:
            async for item in request.items():
                yield item
        finally:
            request.leave()
            self._requests.remove(request)
            turn.cancel()

    @serve.batch(batch_wait_timeout_s=0)  # do not wait for more requests
    async def _turn(self, requests: list[RemoteRequest]) -> list[None]:
        await asyncio.to_thread(self._draw, requests)
        return [None] * len(requests)

    def _draw(self, requests: list[RemoteRequest]) -> None:
        """Generate all images of `requests`, one batch after another.

        Ray Serve closes a batch of requests long before its turn. So images of requests that
        arrived later fill up the batches here, if they may share a batch, and their own turn then
        has less or nothing left to do.
        """
        while own := [request for request in requests if _waits(request)]:
            started = time.perf_counter()
            others = [r for r in list(self._requests) if _waits(r) and r not in own]
            shares = gather([*own, *others], self._pipeline.manifest.batch)
            for share in shares:
                if share.begins:
                    share.job.tell(Begun())
            try:
                images = self._batches.draw(shares)
                drew = Batch(images=len(images), seconds=time.perf_counter() - started)
                next(s.job for s in shares if not s.job.gone or s is shares[-1]).tell(drew)
                self._batches.hand_over(shares, images)
            except CancelledError:
                pass  # no request of the batch is waiting any more
            except Exception as error:  # reported to the requests; the next batch may succeed
                for share in shares:
                    share.job.leave()
                    share.job.tell(error)


def _waits(request: RemoteRequest) -> bool:
    return request.left > 0 and not request.gone
