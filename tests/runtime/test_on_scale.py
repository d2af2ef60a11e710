"""A generation seen and stopped between its scales: events, previews, deadlines, cancelling."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.config import Loaded
from var_deploy.errors import BackendError, CancelledError, UsageError
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.backends.protocol import Launch
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.measure import launch_seconds
from var_deploy.runtime.request import ScaleEvent, TimingModel
from var_deploy.sampling import stack_uniforms

ExportTo = Callable[..., Path]

LABELS = (3, 0, 4, 1, 2)
SCALES, SIDE = 3, 8
LENGTHS = (1, 4, 16)


class Noting(OrtCpuBackend):
    """Notes what a loop asks for; every launch of a scale or the decoder takes `seconds` more."""

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.seconds, self.launched, self.decoded, self.waits = 0.0, 0, 0, 0

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        condition, *scales = launches[:-2]
        return [condition, *map(self._slow, scales), *map(self._decode, launches[-2:])]

    def synchronize(self) -> None:
        self.waits += 1

    def _slow(self, launch: Launch) -> Launch:
        def run() -> None:
            time.sleep(self.seconds)
            self.launched += 1
            launch()

        return run

    def _decode(self, launch: Launch) -> Launch:
        slow = self._slow(launch)

        def run() -> None:
            self.decoded += 1
            slow()

        return run


@pytest.fixture
def noting() -> Noting:
    return Noting()


@pytest.fixture
def fresh(export_to: ExportTo, noting: Noting) -> Iterator[Pipeline]:
    """A pipeline on `noting` that has not learned how long anything takes."""
    folder = export_to(batch=2)
    manifest = read_manifest(folder)
    loop = ScaleLoop(folder, manifest, noting, "fp32", "shared")
    loaded = Loaded(precision="fp32", backend=noting.name, layout="shared")
    with Pipeline(manifest, loop, loaded) as pipeline:
        yield pipeline


# events


def test_every_scale_of_every_batch_is_told(pipe: Pipeline, expected: NDArray[np.uint8]) -> None:
    seen: list[ScaleEvent] = []
    images = pipe.generate(LABELS, seed=7, on_scale=seen.append)
    np.testing.assert_array_equal(images, expected)
    assert [(e.first, e.scale) for e in seen] == [(n, k) for n in (0, 2, 4) for k in range(SCALES)]
    assert {e.scales for e in seen} == {SCALES}
    for event in seen:
        count = 1 if event.first == 4 else 2
        assert event.tokens.shape == (count, LENGTHS[event.scale])
        assert event.tokens.dtype == np.int64
    # the tokens are those of the images, and the caller's own
    tokens = [np.concatenate([e.tokens for e in seen if e.scale == k]) for k in range(SCALES)]
    np.testing.assert_array_equal(pipe.decode(tokens), expected)


def test_previews_are_the_images_so_far(pipe: Pipeline, expected: NDArray[np.uint8]) -> None:
    tokens: list[Any] = [[], [], []]
    previews: list[Any] = [[], [], []]

    def look(event: ScaleEvent) -> None:
        tokens[event.scale].append(event.tokens)
        previews[event.scale].append(event.preview())

    images = pipe.generate(LABELS, seed=7, on_scale=look)
    np.testing.assert_array_equal(images, expected)  # looking changes nothing
    drawn = [np.concatenate(parts) for parts in tokens]
    for k in range(SCALES):
        preview = np.concatenate(previews[k])
        assert preview.shape == (5, SIDE, SIDE, 3) and preview.dtype == np.uint8
        # decoded once more from the tokens, by another graph
        wanted = pipe.decode(drawn, scales=k + 1)
        assert np.abs(preview.astype(int) - wanted).max() <= 1
    np.testing.assert_array_equal(np.concatenate(previews[-1]), expected)
    assert np.abs(np.concatenate(previews[0]).astype(int) - expected).max() > 30


def test_nothing_is_decoded_that_is_not_asked_for(fresh: Pipeline, noting: Noting) -> None:
    fresh.generate(LABELS, on_scale=lambda event: None)
    assert noting.decoded == 3  # one a batch
    fresh.generate(LABELS[:2], on_scale=lambda event: event.preview())
    assert noting.decoded == 3 + 1 + SCALES


def test_without_a_callback_nothing_waits(fresh: Pipeline, noting: Noting) -> None:
    fresh.generate(LABELS[:2])
    assert noting.waits == 1
    fresh.generate(LABELS[:2], on_progress=lambda done, steps: None)
    assert noting.waits == 1 + 1 + SCALES + 1


def test_progress_counts_the_launches_of_all_batches(pipe: Pipeline) -> None:
    told: list[tuple[int, int]] = []
    pipe.generate(LABELS, on_progress=lambda done, steps: told.append((done, steps)))
    assert told == [(n, 3 * (SCALES + 1)) for n in range(1, 3 * (SCALES + 1) + 1)]


def test_a_clock_marks_generations_or_launches(fresh: Pipeline) -> None:
    clock = fresh.start_clock()
    assert fresh.start_clock() is clock
    fresh.generate(LABELS[:2])
    (whole,) = clock.laps()
    clock.each = True
    fresh.generate(LABELS[:2])
    launches = launch_seconds(clock.laps())
    assert len(launches) == 1 + SCALES + 1 and min(launches) >= 0 < whole
    # a generation that ends early is marked to its end as well
    clock.each = False
    fresh.generate(LABELS[:2], deadline=1e-6)
    assert len(clock.laps()) == 1


def test_a_loop_without_a_decoder_draws_the_same_tokens(export_to: ExportTo) -> None:
    folder = export_to(batch=2)
    manifest = read_manifest(folder)
    graphs = {name: g for name, g in manifest.graphs["fp32"].items() if name != names.DECODER}
    lacking = dataclasses.replace(manifest, graphs={"fp32": graphs})
    draws = stack_uniforms([(7, 0), (7, 1)], manifest.model.total_tokens)
    given = ([1, 2], draws, manifest.defaults)
    files = BundleFiles(folder, manifest, "fp32")
    whole = ScaleLoop(files, manifest, OrtCpuBackend(1), "fp32", "shared")
    short = ScaleLoop(files, lacking, OrtCpuBackend(1), "fp32", "shared", decoder=False)
    try:
        whole.run(*given)
        for found, wanted in zip(short.generate_tokens(*given), whole.tokens(), strict=True):
            np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(short.f_hat(), whole.f_hat())
        with pytest.raises(BackendError, match="made without a decoder"):
            short.run(*given)
    finally:
        whole.close()
        short.close()
        files.close()


# seeds


def test_a_seed_an_image(pipe: Pipeline) -> None:
    seeds = [7, 0, 2**64 - 1, 7, 12]
    images = pipe.generate(LABELS, seed=seeds)
    for n, (label, seed) in enumerate(zip(LABELS, seeds, strict=True)):
        alone = pipe.generate([label], seed=seed)[0]
        assert np.abs(images[n].astype(int) - alone).max() <= 1
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=np.array(seeds, np.uint64)), images)
    assert pipe.generate(seed=[1, 2, 3]).shape == (3, SIDE, SIDE, 3)
    for wrong in ([1, 2], []):
        with pytest.raises(UsageError, match="one per image"):
            pipe.generate(LABELS, seed=wrong)
    with pytest.raises(UsageError, match="seed must be a whole number"):
        pipe.generate([0], seed=[1.5])  # type: ignore[list-item]


def test_a_setting_a_scale(pipe: Pipeline, expected: NDArray[np.uint8]) -> None:
    spelled = pipe.generate(LABELS, seed=7, cfg=[0.0, 1.0, 2.0], temperature=(1, 1, 1))
    np.testing.assert_array_equal(spelled, expected)
    greedy = pipe.generate(LABELS, seed=7, top_k=[1, 1, 1])
    np.testing.assert_array_equal(greedy, pipe.generate(LABELS, seed=8, top_k=1))
    with pytest.raises(UsageError, match="3 scales"):
        pipe.generate(LABELS, cfg=[1.0, 2.0])


# deadlines


def test_time_enough_changes_nothing(pipe: Pipeline, expected: NDArray[np.uint8]) -> None:
    images = pipe.generate(LABELS, seed=7, deadline=100)
    np.testing.assert_array_equal(images, expected)
    assert images.scales_done.tolist() == [SCALES] * 5
    assert pipe.generate(LABELS).scales_done.tolist() == [SCALES] * 5
    assert not images[:2].scales_done.size and images.copy().dtype == np.uint8


def test_one_scale_at_least(pipe: Pipeline) -> None:
    first: list[NDArray[np.uint8]] = []
    pipe.generate(
        LABELS, seed=7, on_scale=lambda e: first.append(e.preview()) if e.scale == 0 else None
    )
    images = pipe.generate(LABELS, seed=7, deadline=1e-6)
    assert images.scales_done.tolist() == [1] * 5
    np.testing.assert_array_equal(images, np.concatenate(first))


def test_a_deadline_sets_time_aside_for_the_decoder(
    fresh: Pipeline, noting: Noting
) -> None:
    noting.seconds = 0.04
    whole = fresh.generate([0, 1], seed=7, deadline=100)
    assert whole.scales_done.tolist() == [SCALES] * 2
    started = time.perf_counter()
    images = fresh.generate([0, 1], seed=7, deadline=0.15)  # two scales and the decoder: 0.12
    took = time.perf_counter() - started
    assert images.scales_done.tolist() in ([2, 2], [1, 1])
    assert took < 0.3
    assert np.abs(images.astype(int) - whole).max() > 0
    # of two batches each gets its half
    assert fresh.generate([0, 1, 2], seed=7, deadline=0.2).scales_done.tolist() == [1] * 3


def test_the_first_deadline_of_all_looks_how_long_the_decoder_takes(
    fresh: Pipeline, noting: Noting
) -> None:
    noting.seconds = 0.04
    images = fresh.generate([0], deadline=0.06)
    assert images.scales_done.tolist() == [1]


def test_what_was_never_seen_is_guessed_from_the_scale_before() -> None:
    timing = TimingModel((1, 4, 16))
    assert timing.decoder is None and timing.scale(2) == 0
    timing.saw_scale(0, 0.5)
    assert timing.scale(1) == 2.0 and timing.scale(2) == 8.0
    for seconds in (9.0, 3.0, 1.0, 2.0):  # the first is forgotten
        timing.saw_scale(1, seconds)
        timing.saw_decoder(seconds)
    assert timing.scale(1) == 3.0 and timing.decoder == 3.0


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "1", True])
def test_deadlines_that_are_none(pipe: Pipeline, deadline: Any) -> None:
    with pytest.raises(UsageError, match="deadline must be a number of seconds above 0"):
        pipe.generate([0], deadline=deadline)


# cancelling


@pytest.mark.parametrize("scale", range(SCALES))
def test_a_callback_cancels(pipe: Pipeline, expected: NDArray[np.uint8], scale: int) -> None:
    seen: list[int] = []

    def look(event: ScaleEvent) -> None:
        seen.append(event.scale)
        if event.scale == scale and event.first == 2:
            pipe.cancel()

    with pytest.raises(CancelledError, match="cancelled"):
        pipe.generate(LABELS, seed=1, on_scale=look)
    assert seen == [*range(SCALES), *range(scale + 1)]
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


def test_another_thread_cancels(
    fresh: Pipeline, noting: Noting, expected: NDArray[np.uint8]
) -> None:
    fresh.cancel()  # nothing is drawn: nothing happens
    noting.seconds = 0.05
    timer = threading.Timer(0.07, fresh.cancel)
    timer.start()
    before, images = noting.launched, 200
    with pytest.raises(CancelledError):
        fresh.generate([0] * images)  # twenty seconds and more
    assert noting.launched - before < images * SCALES // fresh.manifest.batch
    timer.join()
    noting.seconds = 0.0
    np.testing.assert_array_equal(fresh.generate(LABELS, seed=7), expected)


def test_a_callback_cannot_use_its_own_pipeline(pipe: Pipeline) -> None:
    tokens = pipe.encode(np.zeros((SIDE, SIDE, 3), np.uint8))
    for use in (lambda: pipe.decode(tokens), lambda: pipe.encode(np.zeros((8, 8, 3), np.uint8))):
        with pytest.raises(UsageError, match="callback"):
            pipe.generate([0], on_scale=lambda event, use=use: use())  # type: ignore[misc]


def test_a_closed_loop_decodes_nothing(export_to: ExportTo) -> None:
    folder = export_to(batch=2)
    loop = ScaleLoop(folder, read_manifest(folder), OrtCpuBackend(1), "fp32", "shared")
    loop.close()
    with pytest.raises(BackendError, match="closed"):
        loop.preview()
    with Pipeline.load(folder, threads=1) as closed:
        pass
    for call in (
        lambda: closed.encode(np.zeros((8, 8, 3), np.uint8)),
        lambda: closed.decode([np.zeros((1, 1), int)]),
        lambda: closed.vary(np.zeros((8, 8, 3), np.uint8), 1),
    ):
        with pytest.raises(BackendError, match="this pipeline is closed"):
            call()
