"""Works that share batches: which images go together, and the drawing of one batch.

A batch takes images from the first work, and where that leaves room, from later ones with equal
settings: an image depends on its seed, number and label alone, not on its neighbours.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from var_deploy.editing import Kept
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import Images, Request, ScaleEvent
from var_deploy.serving.backend import Drawn, Event, ScaleDone, Work

T = TypeVar("T")


class Job:
    """A `Work` that somebody waits for."""

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
        self._put(self._events, event)

    async def next(self, timeout: float | None = None) -> Event:
        """The next event. Raises what went wrong, and asyncio.TimeoutError."""
        event = await asyncio.wait_for(self._events.get(), timeout)
        if isinstance(event, Exception):
            raise event
        return event

    def _put(self, queue: asyncio.Queue[T], event: T) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(queue.put_nowait, event)

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
        return self.work.edit.finish(images) if self.work.edit else images


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, kw_only=True)
class Share(Generic[J]):
    """The images `rows` of a job, at `place` in a batch."""

    job: J
    rows: range
    place: int

    @property
    def begins(self) -> bool:
        """Whether these are the job's first images."""
        return self.rows.start == 0

    def of(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.job.finish(batch[self.place : self.place + len(self.rows)])


def gather(waiting: Sequence[J], batch: int) -> list[Share[J]]:
    """The next batch: images of the first job that waits, then of those that may share with it.

    Counts them as begun.
    """
    first, place = waiting[0], 0
    shares = []
    for job in waiting:
        if job is first or job.shares_batches_with(first):
            rows = range(job.begun, min(job.begun + batch - place, job.work.count))
            if not rows:
                break
            shares.append(Share(job=job, rows=rows, place=place))
            job.begun = rows.stop
            place += len(rows)
    return shares


class BatchDrawer:
    """Draws batches with a pipeline, which nobody else may use meanwhile."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._manifest = pipeline, pipeline.manifest
        lengths = self._manifest.model.scale_lengths
        self._nothing = Kept(
            masks=tuple(np.zeros((1, n), np.bool_) for n in lengths),
            tokens=tuple(np.zeros((1, n), np.int64) for n in lengths),
        )

    def draw(self, shares: Sequence[Share[J]]) -> Images:
        """The images of a batch; previews are told on the way. Raises what `Pipeline.draw` does."""
        for share in shares:
            self._look(share.job)
        first, last = shares[0], self._manifest.model.scales - 1

        def show(event: ScaleEvent) -> None:
            if event.scale < last:  # the last one is the image itself
                self._tell(shares, event.scale, event.preview())

        return self._pipeline.draw(
            self._join(shares),
            show if first.job.work.previews else None,
            self._deadline(first),
            unwanted=lambda: all(share.job.gone for share in shares),
        )

    def hand_over(self, shares: Sequence[Share[J]], images: Images) -> None:
        """Tell everyone whose images are in a batch."""
        scales = self._manifest.model.scales
        if shares[0].job.work.previews and images.scales_done[0] == scales:
            self._tell(shares, scales - 1, np.asarray(images))
        for share in shares:
            job, own = share.job, share.of(np.asarray(images))
            if job.images is None:
                job.images = np.empty((job.work.count, *own.shape[1:]), np.uint8)
            rows = slice(share.rows.start, share.rows.stop)
            job.images[rows] = own
            job.scales_done[rows] = images.scales_done[share.place : share.place + len(own)]
            job.done += len(own)
            if job.done == job.work.count:
                job.tell(Drawn(images=job.images, scales_done=job.scales_done))

    def _tell(self, shares: Sequence[Share[J]], scale: int, images: NDArray[np.uint8]) -> None:
        scales = self._manifest.model.scales
        for share in shares:
            own, first = share.of(images), share.rows.start
            share.job.tell(ScaleDone(scale=scale, scales=scales, first=first, images=own))

    def _look(self, job: Job) -> None:
        """The tokens that an edit keeps."""
        edit = job.work.edit
        if edit is not None and job.kept is None:
            masks = edit.keep_masks(self._manifest.model.patch_nums)
            job.kept = Kept(
                masks=tuple(mask[None] for mask in masks),
                tokens=tuple(self._pipeline.encode(edit.pixels)),
            )

    def _join(self, shares: Sequence[Share[J]]) -> Request:
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

    def _deadline(self, share: Share[J]) -> float | None:
        """Seconds for this batch: its part of what a job has left. One scale is always drawn."""
        end = share.job.end
        if end is None:
            return None
        batches = math.ceil((share.job.work.count - share.rows.start) / self._manifest.batch)
        return max((end - time.perf_counter()) / batches, 1e-3)
