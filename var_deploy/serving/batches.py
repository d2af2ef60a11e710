"""Batches that requests share: which images go together, and the generation of one batch.

A batch takes images of the first request that waits, and where that leaves room, of later requests
with equal settings: an image depends on its seed, number and label (or prompt) alone, not on its
neighbours in the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from var_deploy.image.editing import Kept
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import Images, Request, ScaleEvent
from var_deploy.serving.backend import Drawn, Event, GenerationRequest, ScaleDone

T = TypeVar("T")


class PendingRequest:
    """A `GenerationRequest` that was accepted, and the events for the client that waits for it.

    The client waits in one thread and a batch runs in another: one lock guards what changes.

    Attributes:
        came: time of acceptance, on the clock of `time.perf_counter`.
        end: time of the deadline on that clock, None without a deadline.
    """

    def __init__(self, work: GenerationRequest) -> None:
        self.work = work
        self.came = time.perf_counter()
        self.end = None if work.deadline is None else self.came + work.deadline
        self._lock = threading.Lock()
        self._begun = self._done = 0
        self._gone = False
        self._kept: Kept | None = None
        self._remarks: tuple[str, ...] | None = None
        self._unknown: tuple[str, ...] = ()
        self._images: NDArray[np.uint8] | None = None
        self._scales_done = np.zeros(work.count, np.int64)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    # called by the thread of the client

    async def next(self, timeout: float | None = None) -> Event:
        """Wait for the next event and return it. Re-raises an error of the generation; raises
        asyncio.TimeoutError after `timeout` seconds."""
        event = await asyncio.wait_for(self._events.get(), timeout)
        if isinstance(event, Exception):
            raise event
        return event

    def leave(self) -> None:
        """Record that the client no longer waits."""
        with self._lock:
            self._gone = True

    # called by the thread that generates

    @property
    def gone(self) -> bool:
        """Whether the client no longer waits."""
        with self._lock:
            return self._gone

    @property
    def begun(self) -> bool:
        """Whether any of the request's images were taken into a batch."""
        with self._lock:
            return self._begun > 0

    @property
    def left(self) -> int:
        """Number of images that no batch has taken yet."""
        with self._lock:
            return self.work.count - self._begun

    def take(self, most: int) -> range:
        """Take up to `most` of the images that are left into a batch; returns their numbers."""
        with self._lock:
            start = self._begun
            self._begun = min(start + most, self.work.count)
            return range(start, self._begun)

    def keep(self, encode: Callable[[NDArray[np.uint8]], Sequence[NDArray[np.int64]]]) -> None:
        """Encode the picture of an edit to tokens, once for all batches of the request."""
        edit = self.work.edit
        if edit is not None and self.kept is None:
            kept = edit.kept(encode(edit.pixels))
            with self._lock:
                self._kept = kept

    def remark(self, pipeline: Pipeline) -> None:
        """Ask what there is to say of the prompts, once for all batches of the request."""
        with self._lock:
            asked = self._remarks is None and bool(self.work.prompts)
        if asked:
            texts = [*self.work.prompts, self.work.negative]
            found = tuple(pipeline.remarks(texts)), tuple(pipeline.unknown_words(texts))
            with self._lock:
                self._remarks, self._unknown = found

    @property
    def kept(self) -> Kept | None:
        """Tokens [1, L_k] per scale that images keep; None before `keep` and without an edit."""
        with self._lock:
            return self._kept

    def deliver(
        self, rows: range, images: NDArray[np.uint8], scales_done: NDArray[np.int64]
    ) -> None:
        """Store the generated images `rows`; after the last ones, send `Drawn` with all of them."""
        place = slice(rows.start, rows.stop)
        with self._lock:
            if self._images is None:
                self._images = np.empty((self.work.count, *images.shape[1:]), np.uint8)
            self._images[place] = images
            self._scales_done[place] = scales_done
            self._done += len(rows)
            complete = self._done == self.work.count
            drawn = Drawn(
                images=self._images,
                scales_done=self._scales_done,
                remarks=self._remarks or (),
                unknown=self._unknown,
            )
        if complete:
            self.tell(drawn)

    def tell(self, event: Event | Exception) -> None:
        """Send an event to the client. May be called from any thread."""
        self._put(self._events, event)

    def _put(self, queue: asyncio.Queue[T], event: T) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: no client is left
            self._loop.call_soon_threadsafe(queue.put_nowait, event)

    def shares_batches_with(self, other: PendingRequest) -> bool:
        """Whether images of both requests may be in one batch.

        The settings must be equal. Previews slow a batch down and a deadline may end it early, so
        requests with previews share only with each other, and one with a deadline with none.
        Negative prompts may differ, but either all images of a launch have one or none has.
        """
        mine, theirs = self.work, other.work
        return (
            mine.request.sampling == theirs.request.sampling
            and bool(mine.negative) == bool(theirs.negative)
            and mine.previews == theirs.previews
            and self.end is other.end is None
        )


J = TypeVar("J", bound=PendingRequest)


@dataclass(frozen=True, kw_only=True)
class BatchSlice(Generic[J]):
    """The images `rows` of a request, at the position `place` of a batch."""

    job: J
    rows: range
    place: int

    @property
    def begins(self) -> bool:
        """Whether these are the first images of the request."""
        return self.rows.start == 0

    def of(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the images of this slice, those of an edit with the picture's pixels put back."""
        images, edit = batch[self.place : self.place + len(self.rows)], self.job.work.edit
        return images if edit is None else edit.finish(images)


def gather(waiting: Sequence[J], batch: int) -> list[BatchSlice[J]]:
    """Take the next batch: images of the first waiting request, then of those that may share it.
    """
    first, place = waiting[0], 0
    shares = []
    for job in waiting:
        if job is first or job.shares_batches_with(first):
            rows = job.take(batch - place)
            if not rows:
                break
            shares.append(BatchSlice(job=job, rows=rows, place=place))
            place += len(rows)
    return shares


class BatchRunner:
    """Generates batches with a pipeline, which must not be used by anything else meanwhile.

    Raises UsageError for a bundle that takes prompts and has no text encoder.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._manifest = pipeline, pipeline.manifest
        model = self._manifest.model
        self._nothing = Kept.nothing(model.scale_lengths, model.token_shape)
        if self._manifest.takes_text:
            pipeline.check_text_encoder()

    def draw(self, shares: Sequence[BatchSlice[J]]) -> Images:
        """Generate the images of a batch, and send previews after each scale. Raises the errors of
        `Pipeline.draw`."""
        for share in shares:
            share.job.keep(self._pipeline.encode)
            share.job.remark(self._pipeline)
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

    def hand_over(self, shares: Sequence[BatchSlice[J]], images: Images) -> None:
        """Send the images of a batch to the clients of its requests."""
        scales = self._manifest.model.scales
        if shares[0].job.work.previews and images.scales_done[0] == scales:
            self._tell(shares, scales - 1, np.asarray(images))
        for share in shares:
            own, place = share.of(np.asarray(images)), share.place
            share.job.deliver(share.rows, own, images.scales_done[place : place + len(own)])

    def _tell(self, shares: Sequence[BatchSlice[J]], scale: int, images: NDArray[np.uint8]) -> None:
        scales = self._manifest.model.scales
        for share in shares:
            own, first = share.of(images), share.rows.start
            share.job.tell(ScaleDone(scale=scale, scales=scales, first=first, images=own))

    def _join(self, shares: Sequence[BatchSlice[J]]) -> Request:
        rows = [(share.job, n) for share in shares for n in share.rows]
        kept = [job.kept for job, _ in rows]
        together = None
        if any(kept):
            together = Kept.joined([one or self._nothing for one in kept])
        prompts = None
        if self._manifest.takes_text:
            negatives = [job.work.negative for job, _ in rows]
            prompts = self._pipeline.features(
                [job.work.prompts[n] for job, n in rows], negatives if any(negatives) else None
            )
        return Request(
            labels=[job.work.request.labels[n] for job, n in rows],
            prompts=prompts,
            rng_keys=[job.work.request.rng_keys[n] for job, n in rows],
            sampling=shares[0].job.work.request.sampling,
            kept=together,
        )

    def _deadline(self, share: BatchSlice[J]) -> float | None:
        """Seconds for this batch: its share of the time that the request has left. One scale is
        generated in any case."""
        end = share.job.end
        if end is None:
            return None
        batches = math.ceil((share.job.work.count - share.rows.start) / self._manifest.batch)
        return max((end - time.perf_counter()) / batches, 1e-3)
