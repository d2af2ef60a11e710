"""The queue of requests, first come first served: the part that all backends share."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator

from var_deploy.serving.backend import (
    BusyError,
    Drawn,
    Event,
    GenerationRequest,
    LateError,
    Queued,
    StoppingError,
)
from var_deploy.serving.batches import PendingRequest
from var_deploy.serving.metrics import Metrics

LONGEST_RETRY = 60  # seconds


class RequestQueue(ABC):
    """The client-facing half of a Backend: accepts requests and streams events.

    A subclass generates the images of the waiting requests.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Condition()
        self._waiting: list[PendingRequest] = []  # until all of their images have begun
        self._jobs: set[PendingRequest] = set()  # until their client no longer waits
        self._stopping = False
        metrics.watch_queue(lambda: len(self._waiting))

    @property
    def stopping(self) -> bool:
        return self._stopping

    async def draw(self, work: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Accept a request and yield its events, see `backend.Backend.draw`."""
        with self._lock:
            if self._stopping:
                raise StoppingError("the service is stopping; it takes nothing new")
            job = self._accept(work)
            self._waiting.append(job)
            self._jobs.add(job)
            self._lock.notify_all()
        try:
            while True:
                try:
                    event = await job.next(self._patience(job))
                except asyncio.TimeoutError:
                    with self._lock:
                        self._drop_late()
                    continue
                yield event
                if isinstance(event, Drawn):
                    return
        finally:
            self._leave(job)

    def abort(self) -> None:
        """Refuse new requests and drop the accepted ones, see `backend.Backend.abort`."""
        with self._lock:
            self._stopping = True
            for job in self._jobs:
                job.leave()
                job.tell(StoppingError("the service was stopped"))
            self._waiting.clear()
            self._lock.notify_all()

    @abstractmethod
    def _accept(self, work: GenerationRequest) -> PendingRequest:
        """Accept a request; the lock is held. Raises RefusedError."""

    def _busy(self, retry_after: float) -> BusyError:
        return BusyError(
            f"the queue is full with {len(self._waiting)} requests; come back later",
            min(max(math.ceil(retry_after), 1), LONGEST_RETRY),
        )

    def _patience(self, job: PendingRequest) -> float | None:
        """Seconds until the deadline of a request that waits; None where no deadline can pass."""
        if job.end is None or job.begun or job not in self._waiting:
            return None
        return max(job.end - time.perf_counter(), 0.001)

    def _drop_late(self) -> None:
        """Refuse the waiting requests whose deadline has passed."""
        now = time.perf_counter()
        late = [j for j in self._waiting if not j.begun and j.end is not None and j.end <= now]
        for job in late:
            self._waiting.remove(job)
            job.tell(LateError("the deadline came before this request's turn; nothing was drawn"))

    def _begins(self, job: PendingRequest) -> None:
        """Record the waiting time of a request whose first images are about to be generated."""
        self._metrics.waiting.observe(time.perf_counter() - job.came)

    def _leave(self, job: PendingRequest) -> None:
        """Remove a request whose client no longer waits."""
        with self._lock:
            job.leave()
            self._jobs.discard(job)
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell_positions()

    def _tell_positions(self) -> None:
        for position, job in enumerate(self._waiting):
            if not job.begun:
                job.tell(Queued(position=position))
