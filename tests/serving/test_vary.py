"""POST /v1/vary: what `Pipeline.vary` draws, from pictures that travel as base64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from serving.client import Client, picture

from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROUTE = "/v1/vary"
PHOTO = np.random.default_rng(6).integers(0, 256, (20, 30, 3), np.uint8)
SCALES = 3  # of the small model


@pytest.mark.parametrize("from_scale", range(SCALES + 1))
def test_variations_are_those_of_the_pipeline(
    service: Client, pipe: Pipeline, from_scale: int
) -> None:
    chosen: dict[str, Any] = {"label": "tree", "seed": [3, 8, 9], "cfg": 1.5}
    body = {"image": picture(PHOTO), "from_scale": from_scale, **chosen}
    np.testing.assert_array_equal(
        service.post(ROUTE, body).images(), pipe.vary(PHOTO, from_scale, **chosen)
    )


def test_several_of_one_seed_take_the_seeds_that_follow(service: Client, pipe: Pipeline) -> None:
    body = {"image": picture(PHOTO), "from_scale": 1, "seed": 4, "count": 3}
    reply = service.post(ROUTE, body)
    np.testing.assert_array_equal(reply.images(), pipe.vary(PHOTO, 1, seed=[4, 5, 6]))
    assert [image["seed"] for image in reply.json["images"]] == [4, 5, 6]


def test_previews_come_first(service: Client) -> None:
    body = {"image": picture(PHOTO), "from_scale": 1}
    with service.stream(f"{ROUTE}/stream", body) as events:
        assert [name for name, _ in events] == ["queued", *["scale"] * SCALES, "done"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"from_scale": SCALES + 1}, "from_scale must lie between 0 and 3, found 4"),
        ({"from_scale": -1}, "from_scale must lie between 0 and 3, found -1"),
        ({}, "from_scale: Field required"),
        ({"from_scale": 1, "label": "stra"}, "no class is called 'stra'; did you mean star?"),
        ({"from_scale": 1, "image": "####"}, "the picture is no base64"),
        ({"from_scale": 1, "count": 7}, "count must lie between 1 and 6, found 7"),
    ],
)
def test_what_cannot_be_varied_is_refused(
    service: Client, body: dict[str, Any], reason: str
) -> None:
    reply = service.post(ROUTE, {"image": picture(PHOTO), **body})
    assert (reply.status, reply.error) == (400, reason)
