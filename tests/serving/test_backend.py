"""A backend can be anything that takes a `GenerationRequest` and gives events, pipeline or not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import numpy as np
import pytest
from serving.client import Client, running

from var_deploy.config import Loaded
from var_deploy.errors import BackendError, BundleError
from var_deploy.manifest import Manifest
from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")


FAILURES = {
    90: BackendError("step, scale 3: the logits are not finite; try --precision fp32"),
    91: BackendError("cannot run '/srv/models/d16/fp32/step.onnx': C:\\x\\y.dll is missing"),
    92: BundleError("/srv/models/d16: encoder.onnx changed while it was read"),
}


class Elsewhere:
    """Draws grey squares: the n-th of seed s has the value s + n."""

    stopping = False

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.works: list[Any] = []
        self.closed = 0

    def describe(self) -> Loaded:
        return Loaded(backend="elsewhere", precision="fp32", layout="shared")

    async def draw(self, work: Any) -> AsyncGenerator[Any, None]:
        from var_deploy.serving.backend import BusyError, Drawn, Queued

        self.works.append(work)
        if work.count > 2:
            raise BusyError("nobody is free", 17)
        try:
            yield Queued(position=3)
            if work.request.rng_keys[0][0] == 99:
                raise ZeroDivisionError("nobody thought of this")
            if error := FAILURES.get(work.request.rng_keys[0][0]):
                raise error
            values = [seed + number for seed, number in work.request.rng_keys]
            images = np.array(values, np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
            yield Drawn(images=images, scales_done=np.full(work.count, 3))
        finally:
            self.closed += 1

    async def stop(self) -> None:
        self.stopping = True

    def abort(self) -> None:
        raise AssertionError("nobody asked for that")


@pytest.fixture
def elsewhere(pipe: Pipeline) -> Iterator[tuple[Client, Elsewhere]]:
    from var_deploy.serving.app import create_app

    backend = Elsewhere(pipe.manifest)
    with running(create_app(backend)) as client:
        yield client, backend
    assert backend.stopping


def test_its_images_are_answered(elsewhere: tuple[Client, Elsewhere]) -> None:
    client, backend = elsewhere
    assert client.get("/v1/model").json["backend"] == "elsewhere"
    images = client.post("/v1/images", {"seed": 40, "count": 2, "deadline": 9}).images()
    assert (images[0] == 40).all() and (images[1] == 41).all()
    (work,) = backend.works
    assert (work.deadline, work.previews, work.edit) == (9, False, None)
    with client.stream("/v1/images/stream", {"seed": 7}) as events:
        assert next(events) == ("queued", {"position": 3, "seconds": None})
        assert [name for name, _ in events] == ["done"]
    assert backend.works[1].previews and backend.closed == 2


def test_its_refusals_keep_their_status(elsewhere: tuple[Client, Elsewhere]) -> None:
    client, _ = elsewhere
    for route in ("/v1/images", "/v1/images/stream"):
        reply = client.post(route, {"count": 3})
        assert (reply.status, reply.error) == (429, "nobody is free")
        assert reply.headers["retry-after"] == "17"


def test_what_nobody_thought_of_tells_no_secrets(elsewhere: tuple[Client, Elsewhere]) -> None:
    client, backend = elsewhere
    reply = client.post("/v1/images", {"seed": 99})
    assert reply.status == 500 and reply.error.startswith("internal error")
    with client.stream("/v1/images/stream", {"seed": 99}) as events:
        assert [name for name, _ in events] == ["queued", "error"]
    assert client.post("/v1/images", {"seed": 1}).status == 200
    assert backend.closed == 3


@pytest.mark.parametrize(
    ("seed", "reason"),
    [
        (90, "step, scale 3: the logits are not finite; try --precision fp32"),
        (91, "cannot run 'step.onnx': y.dll is missing"),
        (92, "the bundle cannot be used as it is; the server's log says more"),
    ],
)
def test_a_failure_is_told_without_paths(
    elsewhere: tuple[Client, Elsewhere], seed: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = elsewhere
    reply = client.post("/v1/images", {"seed": seed})
    assert (reply.status, reply.error) == (500, reason)
    with client.stream("/v1/images/stream", {"seed": seed}) as events:
        assert list(events)[-1] == ("error", {"error": reason})
    assert client.post("/v1/images", {"seed": 1}).status == 200
    assert str(FAILURES[seed]) in caplog.text  # all of it is in the log
