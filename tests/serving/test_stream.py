"""The streams: an image that appears scale by scale, as server-sent events."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving.client import Client, picture, pixels

from var_deploy.errors import BackendError
from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROUTE = "/v1/images/stream"
SCALES = 3
PHOTO = np.random.default_rng(5).integers(0, 256, (8, 8, 3), np.uint8)


def told(client: Client, route: str, body: object) -> list[tuple[str, Any]]:
    with client.stream(route, body) as events:
        return list(events)


def position(event: tuple[str, Any]) -> int:
    """Of a request that waits."""
    name, data = event
    assert name == "queued"
    found: int = data["position"]
    return found


def test_the_expected_time_is_that_of_the_last_batches(start: Any, pipe: Pipeline) -> None:
    client = start()
    with client.stream(ROUTE, {}) as events:
        assert next(events) == ("queued", {"position": 0, "seconds": None})
        list(events)
    drawing = "var_deploy_drawing_seconds_sum"
    seconds = client.metrics()[drawing]
    name, data = told(client, ROUTE, {"count": 3})[0]  # two batches of two
    assert name == "queued" and data["seconds"] == pytest.approx(2 * seconds, abs=1e-3)


def test_events_come_in_order(service: Client) -> None:
    events = told(service, ROUTE, {"labels": [1, 2, 3]})
    assert [name for name, _ in events] == ["queued", *["scale"] * 2 * SCALES, "done"]
    assert events[0][1]["position"] == 0
    seen = [
        (data["scale"], data["scales"], [image["number"] for image in data["images"]])
        for name, data in events
        if name == "scale"
    ]
    # two images a batch
    assert seen == [(k, SCALES, numbers) for numbers in ([0, 1], [2]) for k in range(SCALES)]


def test_previews_are_those_of_the_pipeline(service: Client, pipe: Pipeline) -> None:
    wanted: list[Any] = []
    pipe.generate([1, 2], seed=5, on_scale=lambda event: wanted.append(event.preview()))
    scales = told(service, ROUTE, {"labels": [1, 2], "seed": 5})[1:-1]
    for (_, data), expected in zip(scales, wanted, strict=True):
        found = np.stack([pixels(image["png"]) for image in data["images"]])
        np.testing.assert_array_equal(found, expected)


def test_the_last_event_is_the_plain_answer(service: Client) -> None:
    body = {"labels": ["star", "fish"], "seed": 3, "cfg": 1.5}
    name, done = told(service, ROUTE, body)[-1]
    plain = service.post("/v1/images", body).json
    assert name == "done" and done.pop("seconds") > 0
    assert done == {key: value for key, value in plain.items() if key != "seconds"}


def test_edits_are_streamed_too(service: Client) -> None:
    body = {"image": picture(PHOTO), "box": [0, 0, 4, 8], "seed": 3, "keep_pixels": True}
    events = told(service, "/v1/edit/stream", body)
    assert [name for name, _ in events] == ["queued", *["scale"] * SCALES, "done"]
    plain = service.post("/v1/edit", body).json
    assert events[-1][1]["images"] == plain["images"]
    for _, data in events[1:-1]:  # the kept half never flickers
        np.testing.assert_array_equal(pixels(data["images"][0]["png"])[:, 4:], PHOTO[:, 4:])


def test_what_is_refused_has_its_status_not_an_event(service: Client) -> None:
    reply = service.post(ROUTE, {"labels": ["stra"]})
    assert reply.status == 400 and "did you mean star?" in reply.error


def test_a_failure_on_the_way_is_an_event(
    start: Any, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise BackendError("the device\nhas gone")

    monkeypatch.setattr(pipe, "draw", fail)
    client = start()
    assert told(client, ROUTE, {})[1:] == [("error", {"error": "the device has gone"})]
    reply = client.post("/v1/images", {})
    assert reply.status == 500 and reply.error == "the device has gone"
    monkeypatch.undo()
    assert client.post("/v1/images", {}).status == 200  # the queue outlives it


def test_positions_are_told_as_the_queue_moves(start: Any, gate: Any) -> None:
    client = start()
    with ThreadPoolExecutor(2) as pool:
        pool.submit(client.post, "/v1/images", {})
        gate.reached()
        pool.submit(client.post, "/v1/images", {})
        client.wait_for("var_deploy_queue_depth", 1)
        with client.stream(ROUTE, {}) as events:
            assert position(next(events)) == 1
            gate.let_go(1)
            assert position(next(events)) == 0
            gate.let_go(2)
            assert [name for name, _ in events] == [*["scale"] * SCALES, "done"]
