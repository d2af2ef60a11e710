"""A request that waits: which images batches take of it, and what comes back, from two threads."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from var_deploy.runtime.request import Request
from var_deploy.sampling import Sampling, numbered
from var_deploy.serving.backend import Drawn, GenerationRequest
from var_deploy.serving.batches import PendingRequest, gather

COUNT = 200


def work(count: int, cfg: float = 1.0) -> GenerationRequest:
    request = Request(
        labels=[0] * count, rng_keys=numbered(0, 0, count), sampling=Sampling(cfg=cfg)
    )
    return GenerationRequest(request=request)


def test_every_image_is_taken_once_and_comes_back_in_its_place() -> None:
    async def run() -> Drawn:
        job = PendingRequest(work(COUNT))
        assert not job.begun and job.left == COUNT

        def draw() -> None:
            while rows := job.take(3):
                values = np.array(rows, np.int64)
                images = np.broadcast_to(values[:, None, None, None], (len(rows), 2, 2, 3))
                job.deliver(rows, images.astype(np.uint8), values)

        with ThreadPoolExecutor(4) as pool:
            drawing = [asyncio.wrap_future(pool.submit(draw)) for _ in range(4)]
            await asyncio.gather(*drawing)
        assert job.begun and job.left == 0 and not job.take(1)
        event = await job.next(1.0)
        assert isinstance(event, Drawn)
        with pytest.raises(asyncio.TimeoutError):
            await job.next(0.01)  # told once
        return event

    drawn = asyncio.run(run())
    np.testing.assert_array_equal(drawn.scales_done, np.arange(COUNT))
    np.testing.assert_array_equal(drawn.images[:, 1, 1, 2], np.arange(COUNT).astype(np.uint8))


def test_a_batch_is_filled_up_with_jobs_of_equal_settings() -> None:
    async def run() -> None:
        first, other, same = (
            PendingRequest(work(5)),
            PendingRequest(work(2, cfg=2.0)),
            PendingRequest(work(2)),
        )
        shares = gather([first, other, same], 4)
        assert [(s.job, s.rows, s.place) for s in shares] == [(first, range(4), 0)]
        shares = gather([first, other, same], 4)
        assert [(s.job, s.rows, s.place) for s in shares] == [
            (first, range(4, 5), 0),
            (same, range(2), 1),
        ]
        assert [s.begins for s in shares] == [False, True]
        assert (first.left, other.left, other.begun, same.left) == (0, 2, False, 0)
        same.leave()
        assert same.gone and not first.gone

    asyncio.run(run())
