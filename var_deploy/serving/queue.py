"""The backend of one process: a bounded queue, and one thread that draws batches from it.

Requests are served in the order in which they came. A batch takes images from the first one, and
where that leaves room, from later ones with equal settings: an image depends on its seed, number
and label alone, not on its neighbours. Nobody waits for company.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from var_deploy.editing import Kept, blend, keep_masks
from var_deploy.errors import CancelledError
from var_deploy.manifest import Manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import Request, ScaleEvent
from var_deploy.serving.backend import (
    BusyError,
    Drawn,
    Event,
    LateError,
    Queued,
    ScaleDone,
    StoppingError,
    Work,
)
from var_deploy.serving.metrics import Metrics

LONGEST_RETRY = 60  # seconds


class Job:
    """A `Work` in the queue. Its fields are the queue's, under its lock."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.came = time.perf_counter()
        self.end = None if work.deadline is None else self.came + work.deadline
        self.begun = 0  # images that were given to batches
        self.done = 0  # images that came back
        self.gone = False  # nobody waits any more
        self.kept: Kept | None = None  # tokens [1, L_k] that every image keeps
        self.images: NDArray[np.uint8] | None = None
        self.scales_done = np.zeros(work.count, np.int64)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    def tell(self, event: Event | Exception) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, timeout: float | None) -> Event:
        """The next event. Raises what went wrong, and asyncio.TimeoutError."""
        event = await asyncio.wait_for(self._events.get(), timeout)
        if isinstance(event, Exception):
            raise event
        return event

    def shares_batches_with(self, other: Job) -> bool:
        """Previews slow a batch down, and a deadline may end it early: such do it to no other."""
        mine, theirs = self.work, other.work
        return (
            mine.request.sampling == theirs.request.sampling
            and mine.previews == theirs.previews
            and self.end is other.end is None
        )

    def finish(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Images as they are given away."""
        edit = self.work.edit
        return blend(images, edit.pixels[0], edit.new) if edit and edit.keep_pixels else images


@dataclass(frozen=True, kw_only=True)
class Share:
    """The images `rows` of a job, at `place` in a batch."""

    job: Job
    rows: range
    place: int

    def of(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.job.finish(batch[self.place : self.place + len(self.rows)])


class LocalQueue:
    """Draws with a pipeline, which nobody else may use meanwhile.

    Args:
        size: requests that may wait.
    """

    def __init__(self, pipeline: Pipeline, size: int, metrics: Metrics) -> None:
        self._pipeline, self._size, self._metrics = pipeline, size, metrics
        self._lock = threading.Condition()
        self._waiting: list[Job] = []
        self._batch: list[Share] = []
        self._stopping = False
        self._pace = 0.0  # seconds of a batch, the last ones counting most
        self._thread: threading.Thread | None = None
        spec = pipeline.manifest.model
        self._nothing = Kept(
            masks=tuple(np.zeros((1, n), np.bool_) for n in spec.scale_lengths),
            tokens=tuple(np.zeros((1, n), np.int64) for n in spec.scale_lengths),
        )
        metrics.watch_queue(lambda: len(self._waiting))

    @property
    def manifest(self) -> Manifest:
        return self._pipeline.manifest

    @property
    def stopping(self) -> bool:
        return self._stopping

    def describe(self) -> dict[str, str]:
        return self._pipeline.describe()

    async def draw(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `backend.Backend`."""
        job = self._accept(work)
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

    async def stop(self) -> None:
        """See `backend.Backend`."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def abort(self) -> None:
        """See `backend.Backend`."""
        with self._lock:
            self._stopping = True
            for job in {*self._waiting, *(share.job for share in self._batch)}:
                job.gone = True
                job.tell(StoppingError("the service was stopped"))
            self._waiting.clear()
            self._lock.notify_all()

    def _accept(self, work: Work) -> Job:
        with self._lock:
            if self._stopping:
                raise StoppingError("the service is stopping; it takes nothing new")
            if len(self._waiting) >= self._size:
                raise BusyError(
                    f"the queue is full with {len(self._waiting)} requests; come back later",
                    self._retry_after(),
                )
            job = Job(work)
            job.tell(Queued(position=len(self._waiting)))
            self._waiting.append(job)
            if self._thread is None:
                # a daemon: a process that ends without `stop` does not hang on it
                self._thread = threading.Thread(target=self._run, name="draw", daemon=True)
                self._thread.start()
            self._lock.notify_all()
            return job

    def _retry_after(self) -> int:
        """Seconds in which what waits is drawn, as far as is known."""
        images = sum(job.work.count - job.begun for job in self._waiting)
        batches = math.ceil(images / self.manifest.batch)
        return min(max(math.ceil(batches * self._pace), 1), LONGEST_RETRY)

    def _patience(self, job: Job) -> float | None:
        """Seconds until a job is too late to be begun; None where it no longer can be."""
        if job.end is None or job.begun or job not in self._waiting:
            return None
        return max(job.end - time.perf_counter(), 0.001)

    def _drop_late(self) -> None:
        """Refuse those whose deadline came before their turn."""
        now = time.perf_counter()
        late = [j for j in self._waiting if not j.begun and j.end is not None and j.end <= now]
        for job in late:
            self._waiting.remove(job)
            job.tell(LateError("the deadline came before this request's turn; nothing was drawn"))

    def _leave(self, job: Job) -> None:
        """Nobody waits for this job any more."""
        with self._lock:
            job.gone = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell_positions()

    def _tell_positions(self) -> None:
        for position, job in enumerate(self._waiting):
            if not job.begun:
                job.tell(Queued(position=position))

    # the thread

    def _run(self) -> None:
        while shares := self._next():
            try:
                self._draw(shares)
            except CancelledError:
                pass  # it was for nobody
            except Exception as error:  # whatever it is, the next batch may do better
                with self._lock:
                    for share in shares:
                        share.job.tell(error)
                        self._waiting = [job for job in self._waiting if job is not share.job]
            finally:
                with self._lock:
                    self._batch = []

    def _next(self) -> list[Share]:
        """What to draw next; empty once there is nothing left and the service stops."""
        with self._lock:
            self._drop_late()
            while not self._waiting:
                if self._stopping:
                    return []
                self._lock.wait()
                self._drop_late()
            first, place = self._waiting[0], 0
            shares = []
            for job in self._waiting:
                if job is first or job.shares_batches_with(first):
                    room = self.manifest.batch - place
                    rows = range(job.begun, min(job.begun + room, job.work.count))
                    if not rows:
                        break
                    if not job.begun:
                        self._metrics.waiting.observe(time.perf_counter() - job.came)
                    shares.append(Share(job=job, rows=rows, place=place))
                    job.begun = rows.stop
                    place += len(rows)
            self._waiting = [job for job in self._waiting if job.begun < job.work.count]
            self._tell_positions()
            self._batch = shares
            return shares

    def _draw(self, shares: Sequence[Share]) -> None:
        """Draw a batch and tell everyone whose images are in it."""
        started = time.perf_counter()
        for share in shares:
            self._look(share.job)
        first, scales = shares[0], self.manifest.model.scales

        def show(event: ScaleEvent) -> None:
            if event.scale < scales - 1:  # the last one is the image itself
                tell(event.scale, event.preview())

        def tell(scale: int, images: NDArray[np.uint8]) -> None:
            for share in shares:
                share.job.tell(
                    ScaleDone(
                        scale=scale, scales=scales, first=share.rows.start, images=share.of(images)
                    )
                )

        previews = first.job.work.previews
        images = self._pipeline.draw(
            self._join(shares),
            show if previews else None,
            self._deadline(first),
            unwanted=lambda: all(share.job.gone for share in shares),
        )
        self._metrics.images.inc(len(images))
        self._metrics.batch.observe(len(images))
        took = time.perf_counter() - started
        self._metrics.drawing.observe(took)
        self._pace = took if not self._pace else 0.8 * self._pace + 0.2 * took
        if previews and images.scales_done[0] == scales:
            tell(scales - 1, np.asarray(images))
        for share in shares:
            self._hand_over(share, np.asarray(images), images.scales_done)

    def _look(self, job: Job) -> None:
        """The tokens that an edit keeps."""
        edit = job.work.edit
        if edit is not None and job.kept is None:
            masks = keep_masks(edit.new, self.manifest.model.patch_nums)
            job.kept = Kept(
                masks=tuple(mask[None] for mask in masks),
                tokens=tuple(self._pipeline.encode(edit.pixels)),
            )

    def _join(self, shares: Sequence[Share]) -> Request:
        rows = [(share.job, n) for share in shares for n in share.rows]
        kept = [job.kept or self._nothing for job, _ in rows]
        together = None
        if any(job.kept for job, _ in rows):
            together = Kept(
                masks=tuple(map(np.concatenate, zip(*(k.masks for k in kept), strict=True))),
                tokens=tuple(map(np.concatenate, zip(*(k.tokens for k in kept), strict=True))),
            )
        return Request(
            labels=[job.work.request.labels[n] for job, n in rows],
            streams=[job.work.request.streams[n] for job, n in rows],
            sampling=shares[0].job.work.request.sampling,
            kept=together,
        )

    def _deadline(self, share: Share) -> float | None:
        """Seconds for this batch: its part of what a job has left. One scale is always drawn."""
        end = share.job.end
        if end is None:
            return None
        batches = math.ceil((share.job.work.count - share.rows.start) / self.manifest.batch)
        return max((end - time.perf_counter()) / batches, 1e-3)

    def _hand_over(
        self, share: Share, batch: NDArray[np.uint8], scales_done: NDArray[np.int64]
    ) -> None:
        job, images, rows = share.job, share.of(batch), slice(share.rows.start, share.rows.stop)
        if job.images is None:
            job.images = np.empty((job.work.count, *images.shape[1:]), np.uint8)
        job.images[rows] = images
        job.scales_done[rows] = scales_done[share.place : share.place + len(images)]
        job.done += len(images)
        if job.done == job.work.count:
            job.tell(Drawn(images=job.images, scales_done=job.scales_done))
