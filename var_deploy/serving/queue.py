"""The backend of one process: a bounded queue, and one thread that generates batches from it.

Requests are served first come first served, and share batches as `batches` says. A batch that is
not full starts at once: it does not wait for further requests.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence

from var_deploy.config import Loaded
from var_deploy.errors import CancelledError
from var_deploy.manifest import Manifest
from var_deploy.pipeline import Pipeline
from var_deploy.serving.backend import GenerationRequest, Queued
from var_deploy.serving.batches import BatchRunner, BatchSlice, PendingRequest, gather
from var_deploy.serving.metrics import Metrics
from var_deploy.serving.request_queue import RequestQueue


class LocalQueue(RequestQueue):
    """A `Backend` that generates with a pipeline, which nothing else may use meanwhile.

    Args:
        size: number of requests that may wait.
    """

    def __init__(self, pipeline: Pipeline, size: int, metrics: Metrics) -> None:
        super().__init__(metrics)
        self._pipeline, self._size = pipeline, size
        self._drawer = BatchRunner(pipeline)
        self._pace = 0.0  # seconds of a batch, the last ones counting most
        self._thread: threading.Thread | None = None

    @property
    def manifest(self) -> Manifest:
        return self._pipeline.manifest

    def describe(self) -> Loaded:
        return self._pipeline.describe()

    async def stop(self) -> None:
        """Refuse new requests and wait for the accepted ones, see `backend.Backend.stop`."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _accept(self, work: GenerationRequest) -> PendingRequest:
        if len(self._waiting) >= self._size:
            raise self._busy(self._wait())
        job = PendingRequest(work)
        job.tell(Queued(position=len(self._waiting)))
        if self._thread is None:
            # a daemon: a process that ends without `stop` does not hang on it
            self._thread = threading.Thread(target=self._run, name="draw", daemon=True)
            self._thread.start()
        return job

    def _wait(self) -> float:
        """Estimate of the seconds until all waiting requests are done; 0 before the first batch."""
        images = sum(job.left for job in self._waiting)
        return math.ceil(images / self.manifest.batch) * self._pace

    # the thread

    def _run(self) -> None:
        while shares := self._next():
            try:
                self._draw(shares)
            except CancelledError:
                pass  # no client waits for it
            except Exception as error:  # of this batch alone: the next one may succeed
                with self._lock:
                    for share in shares:
                        share.job.tell(error)
                        self._waiting = [job for job in self._waiting if job is not share.job]

    def _next(self) -> list[BatchSlice[PendingRequest]]:
        """Wait for the next batch and return it; empty once nothing waits and the service stops."""
        with self._lock:
            self._drop_late()
            while not self._waiting:
                if self._stopping:
                    return []
                self._lock.wait()
                self._drop_late()
            shares = gather(self._waiting, self.manifest.batch)
            for share in shares:
                if share.begins:
                    self._begins(share.job)
            self._waiting = [job for job in self._waiting if job.left]
            self._tell_positions()
            return shares

    def _draw(self, shares: Sequence[BatchSlice[PendingRequest]]) -> None:
        """Generate a batch and send its images to the clients."""
        started = time.perf_counter()
        images = self._drawer.draw(shares)
        took = time.perf_counter() - started
        self._metrics.drew(len(images), took)
        self._pace = took if not self._pace else 0.8 * self._pace + 0.2 * took
        self._drawer.hand_over(shares, images)
