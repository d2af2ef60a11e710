"""POST /v1/edit: what `Pipeline.edit` draws, from pictures that travel as base64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving.client import Client, picture

from var_deploy.errors import UnchangedError
from var_deploy.image.editing import box_mask
from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROUTE = "/v1/edit"
PHOTO = np.random.default_rng(5).integers(0, 256, (20, 30, 3), np.uint8)
HALF = box_mask((0, 0, 15, 20), 20, 30)
WHITE = 255 * HALF.astype(np.uint8)


@pytest.mark.parametrize(
    ("body", "mask", "arguments"),
    [
        ({"box": [0, 0, 15, 20]}, HALF, {}),
        ({"mask": picture(WHITE)}, HALF, {}),
        ({"box": [0, 0, 15, 20], "outside": True}, ~HALF, {"keep_pixels": True}),
        ({"mask": picture(WHITE), "label": "tree"}, HALF, {"label": "tree", "seed": 9}),
        ({"box": [0, 0, 15, 20], "label": 1}, HALF, {"label": 1, "seed": [3, 8], "cfg": 0.0}),
    ],
)
def test_edits_are_those_of_the_pipeline(
    service: Client, pipe: Pipeline, body: dict[str, Any], mask: Any, arguments: dict[str, Any]
) -> None:
    given = {"image": picture(PHOTO), **body, **arguments}
    np.testing.assert_array_equal(
        service.post(ROUTE, given).images(), pipe.edit(PHOTO, mask, **arguments)
    )


def test_several_of_one_seed_take_the_seeds_that_follow(service: Client, pipe: Pipeline) -> None:
    body = {"image": picture(PHOTO), "box": [0, 0, 15, 20], "seed": 4, "count": 3}
    reply = service.post(ROUTE, body)
    np.testing.assert_array_equal(reply.images(), pipe.edit(PHOTO, HALF, seed=[4, 5, 6]))
    assert [(i["seed"], i["number"]) for i in reply.json["images"]] == [(4, 0), (5, 0), (6, 0)]


def test_a_jpeg_and_a_data_url_will_do(service: Client) -> None:
    for image in (picture(PHOTO, "JPEG"), "data:image/png;base64," + picture(PHOTO)):
        reply = service.post(ROUTE, {"image": image, "box": [0, 0, 9, 9]})
        assert reply.status == 200, reply.data


def test_edits_and_images_share_a_batch(start: Any, pipe: Pipeline, gate: Any) -> None:
    client = start()
    edit = {"image": picture(PHOTO), "box": [0, 0, 15, 20], "seed": 2}
    with ThreadPoolExecutor(3) as pool:
        pool.submit(client.post, "/v1/images", {"labels": [0]})
        gate.reached()
        edited = pool.submit(client.post, ROUTE, edit)
        client.wait_for("var_deploy_queue_depth", 1)
        drawn = pool.submit(client.post, "/v1/images", {"labels": [3], "seed": 6})
        client.wait_for("var_deploy_queue_depth", 2)
        gate.let_go(2)
        np.testing.assert_array_equal(edited.result().images(), pipe.edit(PHOTO, HALF, seed=2))
        np.testing.assert_array_equal(drawn.result().images(), pipe.generate([3], seed=6))
    assert [list(batch.labels) for batch in gate.batches] == [[0], [5, 3]]


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ({}, ("a mask or a box",)),
        ({"box": [0, 0, 9, 9], "mask": picture(WHITE)}, ("not both",)),
        ({"box": [0, 0, 99, 9]}, ("30 × 20", "0,0,99,9")),
        ({"box": [0, 0, 9]}, ("four whole numbers",)),
        ({"box": [0, 0, 30, 20], "outside": True}, ("marks nothing",)),
        ({"mask": picture(WHITE[:9])}, ("the mask has 30 × 9 pixels",)),
        ({"mask": picture(0 * WHITE)}, ("marks nothing",)),
        ({"mask": "no picture"}, ("the mask is no base64",)),
        ({"box": [0, 0, 9, 9], "label": "/etc/passwd"}, ("no class is called '/etc/passwd'",)),
        ({"box": [0, 0, 9, 9], "count": 7}, ("count must lie between 1 and 6",)),
        ({"box": [0, 0, 9, 9], "seed": [1, 2], "count": 3}, ("seed",)),
    ],
)
def test_what_cannot_be_edited_is_refused(
    service: Client, body: dict[str, Any], parts: tuple[str, ...]
) -> None:
    reply = service.post(ROUTE, {"image": picture(PHOTO), **body})
    assert reply.status == 400
    for part in parts:
        assert part in reply.error


def test_a_mask_that_changes_no_token_is_refused(service: Client, pipe: Pipeline) -> None:
    side = pipe.manifest.model.tokenizer.image_side
    small = np.zeros((side, side, 3), np.uint8)
    reply = service.post(ROUTE, {"image": picture(small), "box": [0, 0, 1, 1]})
    assert reply.status == 400 and "too small to change anything" in reply.error
    mask = box_mask((0, 0, 1, 1), side, side)
    with pytest.raises(UnchangedError, match="too small to change anything"):
        pipe.edit(small, mask)
