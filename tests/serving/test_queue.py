"""The queue: its bound, its batches, deadlines, and places that are given back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving.client import Client, Reply

from var_deploy.errors import CancelledError
from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROUTE = "/v1/images"
DEPTH = "var_deploy_queue_depth"


class Crowd:
    """Requests that wait behind one that stands at the gate."""

    def __init__(self, client: Client, gate: Any, pool: ThreadPoolExecutor) -> None:
        self.client, self._pool, self._waiting = client, pool, 0
        self.first = pool.submit(client.post, ROUTE, {})
        gate.reached()

    def join(self, body: dict[str, Any], path: str = ROUTE) -> Future[Reply]:
        """One more, which has its place in the queue when this returns."""
        self._waiting += 1
        asked = self._pool.submit(self.client.post, path, body)
        self.client.wait_for(DEPTH, self._waiting)
        return asked


@pytest.fixture
def crowd(start: Any, gate: Any) -> Iterator[Crowd]:
    client = start()
    with ThreadPoolExecutor(8) as pool:
        yield Crowd(client, gate, pool)
        gate.let_go(1000)


def test_a_full_queue_says_when_to_come_back(crowd: Crowd, gate: Any) -> None:
    waiting = [crowd.join({"seed": n}) for n in range(4)]
    for path in (ROUTE, f"{ROUTE}/stream"):
        reply = crowd.client.post(path, {})
        assert reply.status == 429 and "the queue is full with 4 requests" in reply.error
        assert int(reply.headers["retry-after"]) >= 1
    assert crowd.client.metrics()['var_deploy_rejected_total{reason="busy"}'] == 2
    gate.let_go(1000)
    assert [asked.result().status for asked in (crowd.first, *waiting)] == [200] * 5
    assert crowd.client.post(ROUTE, {}).status == 200


def test_a_batch_takes_from_whoever_wants_the_same(
    crowd: Crowd, gate: Any, pipe: Pipeline
) -> None:
    bodies = [
        {"labels": [0, 1, 2], "seed": 1},
        {"labels": [3], "seed": 2, "cfg": 1},
        {"labels": [4], "seed": 3},
        {"labels": [1], "seed": 4, "cfg": 1},
    ]
    asked = [crowd.join(body) for body in bodies]
    gate.let_go(1000)
    for body, reply in zip(bodies, asked, strict=True):
        np.testing.assert_array_equal(reply.result().images(), pipe.generate(**body))
    # in order of coming, filled up with equal settings
    assert [list(b.labels) for b in gate.batches] == [[5], [0, 1], [2, 4], [3, 1]]
    assert crowd.client.metrics()["var_deploy_images_total"] == 7


def test_previews_and_deadlines_share_with_nobody(crowd: Crowd, gate: Any) -> None:
    crowd.join({"labels": [0], "deadline": 3600})
    crowd.join({"labels": [1]}, f"{ROUTE}/stream")
    crowd.join({"labels": [2], "deadline": 3600})
    last = crowd.join({"labels": [3]})
    gate.let_go(1000)
    assert last.result().status == 200
    assert [list(b.labels) for b in gate.batches] == [[5], [0], [1], [2], [3]]


def test_a_deadline_that_cannot_begin_is_a_504(crowd: Crowd, gate: Any) -> None:
    reply = crowd.client.post(ROUTE, {"deadline": 0.05})
    assert reply.status == 504 and "nothing was drawn" in reply.error
    assert crowd.client.metrics()[DEPTH] == 0
    gate.let_go(1)
    assert crowd.first.result().status == 200
    assert len(gate.batches) == 1


@pytest.mark.parametrize("path", [ROUTE, f"{ROUTE}/stream"])
def test_who_hangs_up_frees_the_place(crowd: Crowd, gate: Any, path: str) -> None:
    from serving.client import JSON

    connection = crowd.client.connect()
    connection.request("POST", path, b'{"labels": [4]}', JSON)
    crowd.client.wait_for(DEPTH, 1)
    connection.close()
    crowd.client.wait_for(DEPTH, 0)
    gate.let_go(1)
    assert crowd.first.result().status == 200
    assert [list(b.labels) for b in gate.batches] == [[5]]


def test_what_is_drawn_for_nobody_is_stopped(
    start: Any, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    draw = pipe.draw

    def endless(request: Any, *arguments: Any, **options: Any) -> Any:
        if request.labels != [4]:
            return draw(request, *arguments, **options)
        try:
            while True:
                draw(request, *arguments, **options)
        except CancelledError as error:
            ended.append(error)
            raise

    monkeypatch.setattr(pipe, "draw", endless)
    client = start()
    with client.stream(f"{ROUTE}/stream", {"labels": [4]}) as events:
        assert [next(events)[0] for _ in range(3)] == ["queued", "scale", "scale"]
    assert client.post(ROUTE, {"labels": [1]}).status == 200  # its turn came
    assert len(ended) == 1


def test_what_others_wait_for_is_not_stopped(crowd: Crowd, gate: Any, pipe: Pipeline) -> None:
    from serving.client import JSON

    kept = crowd.join({"labels": [2], "seed": 3})
    connection = crowd.client.connect()
    connection.request("POST", ROUTE, b'{"labels": [4]}', JSON)
    crowd.client.wait_for(DEPTH, 2)
    gate.let_go(1)
    gate.reached()  # both are in this batch
    connection.close()
    crowd.client.wait_for('var_deploy_requests_total{route="/v1/images",status="499"}', 1)
    gate.let_go(1)
    np.testing.assert_array_equal(kept.result().images(), pipe.generate([2], seed=3))
    assert [list(b.labels) for b in gate.batches] == [[5], [2, 4]]
