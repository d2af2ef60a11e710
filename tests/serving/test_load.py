"""Two hundred clients at once: none is lost, and everyone gets the images of the own seed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving.client import Client, Reply, running

from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

CLIENTS = 200


def crowd(client: Client, bodies: list[dict[str, Any]]) -> list[Reply]:
    together = threading.Barrier(len(bodies))

    def ask(body: dict[str, Any]) -> Reply:
        together.wait()
        return client.post("/v1/images", body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(ask, bodies))


def test_two_hundred_at_once_on_pocket(pocket_bundle: Path) -> None:
    from var_deploy.serving.app import create_app
    from var_deploy.serving.settings import Settings

    bodies = [{"labels": [n % 10], "seed": n} for n in range(CLIENTS)]
    with Pipeline.load(pocket_bundle, threads=1) as pipe:
        with running(create_app(pipe, Settings(queue=CLIENTS))) as client:
            replies = crowd(client, bodies)
            metrics = client.metrics()
        for body, reply in zip(bodies, replies, strict=True):
            np.testing.assert_array_equal(reply.images(), pipe.generate(**body))
    assert metrics["var_deploy_images_total"] == CLIENTS
    assert metrics["var_deploy_queue_depth"] == 0


def test_who_finds_the_queue_full_is_told_so(start: Any, pipe: Pipeline) -> None:
    """Of a crowd that is far too large, each is drawn or sent away: none waits for ever."""
    bodies = [{"labels": [n % 5], "seed": n} for n in range(60)]
    client = start(queue=3)
    replies = crowd(client, bodies)
    drawn = [pair for pair in zip(bodies, replies, strict=True) if pair[1].status == 200]
    assert drawn
    for body, reply in drawn:
        np.testing.assert_array_equal(reply.images(), pipe.generate(**body))
    rest = [reply for reply in replies if reply.status != 200]
    assert {reply.status for reply in rest} <= {429}
    metrics = client.metrics()
    assert metrics["var_deploy_images_total"] == len(drawn)
    assert metrics.get('var_deploy_rejected_total{reason="busy"}', 0) == len(rest)
