"""The service's backend on Ray Serve: sends requests to replicas and passes on their events."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from var_deploy.cluster.replica import Batch, Begun, Item
from var_deploy.config import Loaded
from var_deploy.manifest import Manifest
from var_deploy.serving.backend import Drawn, GenerationRequest, Queued, RefusedError
from var_deploy.serving.batches import PendingRequest
from var_deploy.serving.metrics import Metrics
from var_deploy.serving.request_queue import RequestQueue

PROMPT = 0.05  # seconds in which Ray refuses a request when its queue is full


class LostError(RefusedError):
    """Two replicas died, one after the other, while they generated the images of a request."""


class RayBackend(RequestQueue):
    """Sends works to the replicas of a deployment.

    Ray queues the requests and does not tell their positions. This class counts requests that
    arrived and that have begun, so positions are right as far as Ray keeps the order.

    Args:
        replica: handle of the deployment.
        how: `Pipeline.describe` of a replica's pipeline.
    """

    def __init__(
        self,
        replica: DeploymentHandle[Any],
        manifest: Manifest,
        how: Loaded,
        metrics: Metrics,
    ) -> None:
        super().__init__(metrics)
        self.manifest, self._how = manifest, how
        self._replicas: Any = replica.draw.options(stream=True)
        self._followers: dict[PendingRequest, asyncio.Task[None]] = {}
        self._announcements: dict[PendingRequest, asyncio.TimerHandle] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._seconds = 1.0  # moving average of the seconds from a request to its images

    def describe(self) -> Loaded:
        return self._how

    async def stop(self) -> None:
        """Refuse new requests and wait for the others, see `serving.backend.Backend.stop`."""
        self._stopping = True
        await self._idle.wait()

    def _accept(self, work: GenerationRequest) -> PendingRequest:
        job, loop = PendingRequest(work), asyncio.get_running_loop()
        self._followers[job] = loop.create_task(self._follow(job))
        self._announcements[job] = loop.call_later(PROMPT, self._announce, job)
        self._idle.clear()
        return job

    def _leave(self, job: PendingRequest) -> None:
        super()._leave(job)
        self._followers.pop(job).cancel()
        self._withdraw(job)
        if not self._jobs:
            self._idle.set()

    def _announce(self, job: PendingRequest) -> None:
        """Send the position in the queue, once Ray has not refused the request."""
        self._withdraw(job)
        if job in self._waiting:
            job.tell(Queued(position=self._waiting.index(job)))

    def _withdraw(self, job: PendingRequest) -> bool:
        """Cancel the announcement of a position; return whether it was still pending."""
        timer = self._announcements.pop(job, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    async def _follow(self, job: PendingRequest) -> None:
        try:
            try:
                await self._ask(job)
            except RayActorError:  # its replica has died; another one generates the same images
                await self._ask(job)
        except RayActorError:
            job.tell(LostError("what drew this was lost twice; ask again", 1))
        except BackPressureError:
            if job in self._waiting:
                self._waiting.remove(job)
            job.tell(self._busy(self._seconds))
        except Exception as error:
            job.tell(error)

    async def _ask(self, job: PendingRequest) -> None:
        end = None if job.end is None else time.time() + job.end - time.perf_counter()
        told = self._replicas.remote(job.work, end)
        try:
            async for item in told:
                self._take(job, item)
        except asyncio.CancelledError:
            told.cancel()
            raise

    def _take(self, job: PendingRequest, item: Item) -> None:
        if isinstance(item, Begun):
            if job in self._waiting:
                job.take(job.work.count)
                self._begins(job)
                self._waiting.remove(job)
                self._tell_positions()
            if self._withdraw(job):
                job.tell(Queued(position=0))
        elif isinstance(item, Batch):
            self._metrics.drew(item.images, item.seconds)
        else:
            if isinstance(item, Drawn):
                self._seconds = 0.8 * self._seconds + 0.2 * (time.perf_counter() - job.came)
            job.tell(item)
