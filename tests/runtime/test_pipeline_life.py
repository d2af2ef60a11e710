"""The life of a pipeline: progress, closing, cancelling, threads, and the memory it holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy.errors import BackendError, UsageError
from var_deploy.pipeline import Pipeline

Images = NDArray[np.uint8]
ExportTo = Callable[..., Path]

LABELS = (3, 0, 4, 1, 2)
SCALES, SIDE = 3, 8
def test_progress_counts_every_launch(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe.generate(LABELS, on_progress=lambda done, steps: seen.append((done, steps)))
    launches = 3 * (SCALES + 1)  # five images, two at a time: every scale and the decoder
    assert seen == [(n, launches) for n in range(1, launches + 1)]


def test_close(export_to: ExportTo) -> None:
    with Pipeline.load(export_to(batch=2), threads=1) as closed:
        closed.generate([0])
    with pytest.raises(BackendError, match="this pipeline is closed"):
        closed.generate([0])
    closed.close()
    assert closed.describe().backend == "onnxruntime-cpu"


def test_a_callback_cannot_use_its_own_pipeline(pipe: Pipeline, expected: Images) -> None:
    for use in (pipe.close, lambda: pipe.generate([0])):

        def callback(done: int, steps: int, use: Callable[[], object] = use) -> None:
            use()

        with pytest.raises(UsageError, match="callback"):
            pipe.generate([0], on_progress=callback)
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


def test_an_exception_passes_through_the_context(export_to: ExportTo) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Pipeline.load(export_to(batch=2), threads=1) as closed,
    ):
        raise ZeroDivisionError
    with pytest.raises(BackendError, match="closed"):
        closed.generate([0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("when", [1, SCALES + 1, SCALES + 3])
def test_cancelling_leaves_nothing_behind(
    pipe: Pipeline, expected: Images, error: type[BaseException], when: int
) -> None:
    def cancel(done: int, steps: int) -> None:
        if done == when:
            raise error

    with pytest.raises(error):
        pipe.generate([2, 2, 2], seed=1, on_progress=cancel)
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


def test_two_pipelines_at_once(export_to: ExportTo, pipe: Pipeline, expected: Images) -> None:
    with Pipeline.load(export_to(batch=2), threads=1) as other:
        found: list[Images] = []

        def between(done: int, steps: int) -> None:  # one generates inside the other
            found.append(other.generate(LABELS, seed=done))

        np.testing.assert_array_equal(pipe.generate(LABELS, seed=7, on_progress=between), expected)
        for done, images in enumerate(found, start=1):
            np.testing.assert_array_equal(images, pipe.generate(LABELS, seed=done))
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


def test_threads_wait_for_their_turn(pipe: Pipeline) -> None:
    seeds = range(8)
    wanted = [pipe.generate(LABELS, seed=seed) for seed in seeds]
    found: dict[int, Images] = {}

    def work(seed: int) -> None:
        found[seed] = pipe.generate(LABELS, seed=seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for seed in seeds:
        np.testing.assert_array_equal(found[seed], wanted[seed])


def test_closing_while_another_thread_waits(export_to: ExportTo) -> None:
    shared = Pipeline.load(export_to(batch=2), threads=1)
    running, closing = threading.Event(), threading.Event()
    ended: list[object] = []

    def first(done: int, steps: int) -> None:
        running.set()
        closing.wait(60)

    def work(**options: Any) -> None:
        try:
            ended.append(shared.generate([0], **options).shape)
        except BackendError as error:
            ended.append(str(error))

    workers = [threading.Thread(target=work, kwargs={"on_progress": first})]
    workers[0].start()
    assert running.wait(60)
    workers += [threading.Thread(target=shared.close), threading.Thread(target=work)]
    for worker in workers[1:]:
        worker.start()
    closing.set()
    for worker in workers:
        worker.join(60)
    assert ended[0] == (1, SIDE, SIDE, 3), "what runs is finished first"
    assert ended[1] in ("this pipeline is closed", (1, SIDE, SIDE, 3)), "either order, no crash"
