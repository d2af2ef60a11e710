"""Requests for N images: split into batches of B and generated with the scale loop."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import UsageError
from var_deploy.image.editing import Kept
from var_deploy.labels import resolve_labels
from var_deploy.manifest import Manifest
from var_deploy.runtime.buffers import Conditions
from var_deploy.runtime.generated import Images as Images
from var_deploy.runtime.loop import Answer, ScaleLoop
from var_deploy.runtime.prompts import PromptRows
from var_deploy.sampling import Sampling, gumbel, stack_uniforms

REMEMBERED = 3  # runs; the slowest of them is the time expected of the next one


@dataclass(frozen=True, kw_only=True)
class Request:
    """N images to generate.

    Attributes:
        labels: one class number per image; 0 where the model has no classes.
        prompts: features of one prompt per image, for a text-to-image model; else None.
        rng_keys: one (seed, number) per image, from which its uniforms are computed.
        forced: tokens [N, L_k] of the first scales, which are then not sampled.
        kept: tokens of any scale that are not sampled.
    """

    labels: Sequence[int]
    rng_keys: Sequence[tuple[int, int]]
    sampling: Sampling
    forced: tuple[NDArray[np.int64], ...] = ()
    kept: Kept | None = None
    prompts: PromptRows | None = None

    def conditions(self, rows: Sequence[int]) -> Conditions:
        """Return the labels, or the features of the prompts, of some of the images."""
        if self.prompts is not None:
            return self.prompts.rows(rows)
        return [self.labels[n] for n in rows]


@dataclass(frozen=True, kw_only=True)
class ScaleEvent:
    """Event after one scale of a batch of images; valid only within the `on_scale` callback.

    Attributes:
        scale: number of the scale, from 0.
        scales: K, the number of scales.
        first: index in the request of the batch's first image.
        tokens: sampled tokens [n, L_k] int64 of the batch's n images; a copy. With `more_smooth`
            the image is not made of these tokens, see `sampling.smoothing`.
        preview: call it to decode the scales so far, with smoothing: uint8
            [n, side, side, channels]. A call takes as long as the decoder; without a call there
            is no cost.
    """

    scale: int
    scales: int
    first: int
    tokens: NDArray[np.int64]
    preview: Callable[[], NDArray[np.uint8]]


class TimingModel:
    """Expected seconds of each scale and of the decoder, from the last runs; used for deadlines."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._scales: list[list[float]] = [[] for _ in lengths]
        self._decoder: list[float] = []

    @property
    def decoder(self) -> float | None:
        """Expected seconds of the decoder; None before its first run."""
        return max(self._decoder, default=None)

    def scale(self, scale: int) -> float:
        """Expected seconds of a scale; before its first run, scaled by tokens from the previous
        scale."""
        if self._scales[scale] or not scale:
            return max(self._scales[scale], default=0.0)
        return self.scale(scale - 1) * self._lengths[scale] / self._lengths[scale - 1]

    def saw_scale(self, scale: int, seconds: float) -> None:
        """Record the time of a scale."""
        self._scales[scale] = [*self._scales[scale], seconds][-REMEMBERED:]

    def saw_decoder(self, seconds: float) -> None:
        """Record the time of the decoder."""
        self._decoder = [*self._decoder, seconds][-REMEMBERED:]


class Batches:
    """Generates the images of requests in batches of B; the last batch is padded.

    Args:
        cancelled: called before each launch; True cancels the request.
        timing: what earlier loops of the same bundle took; None where there were none.
    """

    def __init__(
        self,
        manifest: Manifest,
        loop: ScaleLoop,
        cancelled: Callable[[], bool],
        timing: TimingModel | None = None,
    ) -> None:
        self._manifest, self._loop, self._cancelled = manifest, loop, cancelled
        self._timing = timing or TimingModel(manifest.model.scale_lengths)

    def draw(
        self,
        request: Request,
        on_progress: Callable[[int, int], None] | None = None,
        on_scale: Callable[[ScaleEvent], object] | None = None,
        end: float | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Images:
        """Generate the images of a request.

        Args:
            on_progress: called with (launches done, total launches).
            on_scale: called after each scale of each batch.
            end: deadline on the clock of `time.perf_counter`. The remaining time is shared
                equally by the remaining batches.
            cancelled: called before each launch, in addition to the one of all requests.

        Raises CancelledError, and BackendError where the runtime fails.
        """
        spec, batch, count = self._manifest.model, self._manifest.batch, len(request.labels)
        shape = (count, *spec.tokenizer.image_size, spec.tokenizer.image_channels)
        images = Images.blank(shape, spec.scales)
        starts = range(0, count, batch)
        shared = self._cancelled
        stop = shared if cancelled is None else lambda: shared() or cancelled()
        watcher: _Watcher | None = None
        if on_progress or on_scale or end is not None:
            watcher = _Watcher(self._loop, self._timing, len(starts), on_progress, on_scale, end)
        for first in starts:
            rows = list(range(first, min(first + batch, count)))
            if watcher:
                watcher.begin_batch(first, len(rows))
            drawn = self._batch(request, rows, watcher, stop)
            images[first : first + len(rows)] = to_uint8(drawn[: len(rows)])
            images.scales_done[first : first + len(rows)] = self._loop.scales_done
        return images

    def _batch(
        self,
        request: Request,
        rows: list[int],
        watcher: _Watcher | None,
        cancelled: Callable[[], bool],
    ) -> NDArray[np.float32]:
        padded = rows + rows[-1:] * (self._manifest.batch - len(rows))
        model = self._manifest.model
        noise: list[NDArray[np.float32]] = []
        if self._manifest.more_smooth:
            sizes = model.total_tokens, model.tokenizer.token_values
            noise = [gumbel(*request.rng_keys[n], *sizes) for n in rows]
            noise += noise[-1:] * (len(padded) - len(rows))
        return self._loop.run(
            request.conditions(padded),
            stack_uniforms((request.rng_keys[n] for n in padded), model.draws),
            request.sampling,
            watcher,
            forced=[tokens[padded] for tokens in request.forced],
            keep=request.kept.rows(padded) if request.kept else None,
            cancelled=cancelled,
            noise=noise,
        )


class _Watcher:
    """An `Observer` for one request: reports progress, calls `on_scale`, keeps the deadline.

    Args:
        batches: number of batches in the request.
        end: see `Batches.draw`.
    """

    def __init__(
        self,
        loop: ScaleLoop,
        timing: TimingModel,
        batches: int,
        on_progress: Callable[[int, int], None] | None,
        on_scale: Callable[[ScaleEvent], object] | None,
        end: float | None,
    ) -> None:
        self._loop, self._timing, self._scales = loop, timing, loop.scales
        self._on_progress, self._on_scale = on_progress, on_scale
        self._batches_left, self._launched = batches, 0
        self._launches = batches * (self._scales + 1)
        self._end = self._batch_end = end
        self._first = self._count = 0
        self._since = 0.0

    def begin_batch(self, first: int, count: int) -> None:
        """Start a batch: the next run generates images `first` … `first + count - 1`."""
        self._first, self._count = first, count
        self._since = now = time.perf_counter()
        if self._end is not None:
            self._batch_end = now + (self._end - now) / self._batches_left
        self._batches_left -= 1

    def after_scale(self, done: int) -> Answer:
        self._timing.saw_scale(done - 1, time.perf_counter() - self._since)
        if self._on_scale:
            self._on_scale(self._event(done - 1))
        late = done < self._scales and self._late(done)
        self._report(done)
        return Answer.DECODE if late else Answer.GO_ON

    def after_decoder(self) -> None:
        self._timing.saw_decoder(time.perf_counter() - self._since)
        self._launched += self._scales + 1
        self._report(0)

    def _report(self, done: int) -> None:
        """Report progress after `done` scales of this batch."""
        if self._on_progress:
            self._on_progress(self._launched + done, self._launches)
        self._since = time.perf_counter()

    def _late(self, following: int) -> bool:
        """Whether the next scale and the decoder would end after the deadline."""
        if self._batch_end is None:
            return False
        if self._timing.decoder is None:  # the first request with a deadline: time the decoder once
            self._preview()
        decoder = self._timing.decoder or 0.0
        return time.perf_counter() + self._timing.scale(following) + decoder > self._batch_end

    def _event(self, scale: int) -> ScaleEvent:
        return ScaleEvent(
            scale=scale,
            scales=self._scales,
            first=self._first,
            tokens=self._loop.drawn(scale)[: self._count],
            preview=self._preview,
        )

    def _preview(self) -> NDArray[np.uint8]:
        started = time.perf_counter()
        image = to_uint8(self._loop.preview()[: self._count])
        self._timing.saw_decoder(time.perf_counter() - started)
        return image


def to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert images from [0, 1] to 0 … 255, rounded; the loop has refused NaN before."""
    return np.rint(images * 255).astype(np.uint8)


def end_of(deadline: float | None) -> float | None:
    """Convert a deadline in seconds from now to the clock of `time.perf_counter`; None stays None.

    Raises UsageError for a deadline that is not a number above 0.
    """
    if deadline is None:
        return None
    number = isinstance(deadline, numbers.Real) and not isinstance(deadline, bool)
    if not number or not math.isfinite(deadline) or deadline <= 0:
        raise UsageError(f"deadline must be a number of seconds above 0, found {deadline!r}")
    return time.perf_counter() + deadline


def label_numbers(manifest: Manifest, labels: Sequence[int | str | None]) -> list[int]:
    """Convert labels (class names or numbers) to class numbers; all 0 for a model without classes.

    A label None means "no class", whose number is the number of classes.
    """
    transformer = manifest.model.transformer
    if not transformer.conditional:
        return [0] * len(labels)
    given = [label for label in labels if label is not None]
    if not given and len(labels):
        return [transformer.classes] * len(labels)
    numbers = iter(resolve_labels(given, manifest.labels, transformer.classes))
    return [transformer.classes if label is None else next(numbers) for label in labels]
