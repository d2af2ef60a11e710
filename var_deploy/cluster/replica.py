"""What draws on Ray Serve: a pipeline a replica, in batches that Ray Serve gathers."""

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
from var_deploy.pipeline import Pipeline
from var_deploy.serving.backend import Drawn, Event, Work
from var_deploy.serving.batches import BatchDrawer, Job, gather

SOON = 1e-3  # seconds: what a deadline that has passed on the way leaves


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The first images of a work are about to be drawn."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch was drawn. Told to one of those whose images were in it, for the metrics."""

    images: int
    seconds: float


Item = Event | Begun | Batch | VarDeployError


class RemoteRequest(Job):
    """A job whose events travel to another process, and notes of how it goes with them."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._items: asyncio.Queue[Item | Exception] = asyncio.Queue()

    def tell(self, event: Item | Exception) -> None:
        self._put(self._items, event)

    async def items(self) -> AsyncGenerator[Item, None]:
        """Up to the images, or to what came instead. Raises what nobody thought of."""
        while True:
            item = await self._items.get()
            if isinstance(item, Exception) and not isinstance(item, VarDeployError):
                raise item
            yield item
            if isinstance(item, Drawn | VarDeployError):
                return


class Replica:
    """A replica.

    Args:
        cores: CPU threads that are this replica's, for where it draws without a GPU after all.
    """

    def __init__(self, source: BundleSource, config: RuntimeConfig, cores: int) -> None:
        self._pipeline = Pipeline.open(source.path(), config, digest=source.digest, cores=cores)
        self._batches = BatchDrawer(self._pipeline)
        self._requests: list[RemoteRequest] = []  # all that are here, in order of arrival
        turn: Any = self._turn  # it has more to it than its types say
        turn.set_max_batch_size(self._pipeline.manifest.batch)

    def describe(self) -> Loaded:
        return self._pipeline.describe()

    async def draw(self, work: Work, end: float | None) -> AsyncGenerator[Item, None]:
        """Begun, Batch and events, then Drawn or what is wrong.

        `end` is when the deadline comes on the clock of `time.time`, which nodes agree upon: the
        way here takes time of its own.
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

    @serve.batch(batch_wait_timeout_s=0)  # nobody waits for company
    async def _turn(self, requests: list[RemoteRequest]) -> list[None]:
        await asyncio.to_thread(self._draw, requests)
        return [None] * len(requests)

    def _draw(self, requests: list[RemoteRequest]) -> None:
        """All images of some requests, one batch after another.

        Ray Serve closes its batches when they come, long before their turn. So whoever is here by
        then and may share a batch fills it up, and has had all or a part of the own turn already.
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
                pass  # it was for nobody
            except Exception as error:  # whatever it is, the next batch may do better
                for share in shares:
                    share.job.leave()
                    share.job.tell(error)


def _waits(request: RemoteRequest) -> bool:
    return request.left > 0 and not request.gone
