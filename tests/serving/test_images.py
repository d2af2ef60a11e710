"""POST /v1/images: the images of the pipeline, as PNG and as JSON."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving.client import Client

from var_deploy.image.images import grid
from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROUTE = "/v1/images"


def test_the_images_are_those_of_the_pipeline(service: Client, pipe: Pipeline) -> None:
    labels = ["star", 3, "HEART"]
    reply = service.post(ROUTE, {"labels": labels, "seed": 7})
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    np.testing.assert_array_equal(reply.images(), pipe.generate(labels, seed=7))
    facts = [(i["label"], i["seed"], i["number"], i["scales_done"]) for i in reply.json["images"]]
    assert facts == [("star", 7, 0, 3), ("tree", 8, 0, 3), ("heart", 9, 0, 3)]
    assert reply.json["digest"] == pipe.manifest.digest()
    assert reply.json["seconds"] > 0


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ({}, {}),
        ({"count": 3}, {"labels": [5, 5, 5]}),  # 5 is "no class" of five
        ({"seed": [4, 9]}, {"seed": [4, 9]}),
        ({"labels": [1], "count": 3, "seed": 2}, {"labels": [1, 1, 1], "seed": 2}),
        ({"labels": [1, 2], "count": 3}, {"labels": [1, 2, 1]}),
        ({"labels": [1, None], "count": 3}, {"labels": [1, None, 1]}),
        ({"labels": [0], "seed": [4, 9]}, {"labels": [0, 0], "seed": [4, 9]}),
        ({"label": "star"}, {"labels": ["star"]}),
        ({"label": [1, None], "count": 3}, {"labels": [1, None, 1]}),
        (
            {"labels": [0], "cfg": [0, 1, 3], "top_k": 7, "top_p": 0.5, "temperature": 2},
            {"labels": [0], "cfg": [0, 1, 3], "top_k": 7, "top_p": 0.5, "temperature": 2},
        ),
        ({"labels": ["tree"], "seed": 2**64 - 1}, {"labels": ["tree"], "seed": 2**64 - 1}),
    ],
)
def test_bodies_mean_what_the_arguments_mean(
    service: Client, pipe: Pipeline, body: dict[str, Any], arguments: dict[str, Any]
) -> None:
    images = service.post(ROUTE, body).images()
    if arguments.get("labels") == [5, 5, 5]:  # the pipeline has no class for itself alone
        expected = pipe.generate(None)
        images = images[:1]
    else:
        expected = pipe.generate(**arguments)
    np.testing.assert_array_equal(images, expected)


def test_settings_are_told_as_they_were_used(service: Client, pipe: Pipeline) -> None:
    settings = service.post(ROUTE, {"cfg": [0, 1, 2.5], "top_k": 9}).json["settings"]
    rest = {"top_p": pipe.manifest.defaults.top_p, "temperature": 1.0}
    assert settings == {"cfg": [0.0, 1.0, 2.5], "top_k": 9, **rest}


@pytest.mark.parametrize(
    ("format", "accept"), [("png", "*/*"), (None, "image/png"), ("png", "application/json")]
)
def test_one_png(service: Client, pipe: Pipeline, format: str | None, accept: str) -> None:
    body = {"labels": ["fish"], "seed": 3, "format": format}
    reply = service.post(ROUTE, body, Accept=accept)
    assert reply.status == 200 and reply.headers["content-type"] == "image/png"
    assert (reply.headers["x-seed"], reply.headers["x-scales-done"]) == ("3", "3")
    with Image.open(io.BytesIO(reply.data)) as image:
        np.testing.assert_array_equal(np.asarray(image), pipe.generate(["fish"], seed=3)[0])
        assert image.info["bundle"] == pipe.manifest.digest()
        assert (image.info["seed"], image.info["labels"]) == ("3", "4 fish")


def test_several_images_are_a_grid(service: Client, pipe: Pipeline) -> None:
    reply = service.post(ROUTE, {"labels": [0, 1, 2], "seed": 5, "format": "png"})
    with Image.open(io.BytesIO(reply.data)) as image:
        expected = grid(pipe.generate([0, 1, 2], seed=5))
        np.testing.assert_array_equal(np.asarray(image), expected)
    assert reply.headers["x-scales-done"] == "3,3,3"


def test_json_wins_where_the_body_asks_for_it(service: Client) -> None:
    reply = service.post(ROUTE, {"format": "json"}, Accept="image/png")
    assert reply.headers["content-type"] == "application/json"


def test_every_png_says_how_to_make_it_again(service: Client) -> None:
    images = service.post(ROUTE, {"labels": ["star", 1], "seed": 8}).json["images"]
    for number, (image, label) in enumerate(zip(images, ("0 star", "1 heart"), strict=True)):
        with Image.open(io.BytesIO(base64.b64decode(image["png"]))) as opened:
            about = opened.info
        assert (about["labels"], about["seed"]) == (label, str(8 + number))


def test_a_deadline_is_kept_and_told(service: Client, pipe: Pipeline) -> None:
    plenty = service.post(ROUTE, {"labels": [1, 2, 3], "seed": 1, "deadline": 60})
    np.testing.assert_array_equal(plenty.images(), pipe.generate([1, 2, 3], seed=1))


def test_a_deadline_that_leaves_a_moment_gives_the_first_scale(
    start: Any, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = pipe.draw

    def too_slow(request: Any, on_scale: Any, deadline: float | None, **options: Any) -> Any:
        assert deadline is not None and deadline <= 30
        return draw(request, on_scale, 1e-9, **options)

    monkeypatch.setattr(pipe, "draw", too_slow)
    reply = start().post(ROUTE, {"labels": [1, 2, 3], "deadline": 30})
    assert [image["scales_done"] for image in reply.json["images"]] == [1, 1, 1]


def test_model_says_what_is_served(service: Client, pipe: Pipeline) -> None:
    model = service.get("/v1/model").json
    defaults = pipe.manifest.defaults
    assert model == {
        "name": "small",
        "digest": pipe.manifest.digest(),
        "takes": "labels",
        "text_length": 0,
        "examples": [],
        "height": 8,
        "width": 8,
        "grids": [[1, 1], [2, 2], [4, 4]],
        "side": 8,
        "channels": 3,
        "patch_nums": [1, 2, 4],
        "scales": 3,
        "labels": ["star", "heart", "house", "tree", "fish"],
        "synonyms": [[]] * 5,
        "classes": 5,
        "codes": 48,
        "conditional": True,
        "guidance": True,
        "defaults": {
            "cfg": defaults.cfg,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "temperature": defaults.temperature,
        },
        "precision": "fp32",
        "backend": "onnxruntime-cpu",
        "batch": 2,
        "limits": {
            **{"queue": 4, "count": 6, "pixels": 10_000, "body": 100_000},
            "prompt": 4000,
        },
        "editing": True,
    }


@pytest.mark.parametrize(
    "body", [{"prompts": ["a fox"]}, {"prompt": ""}, {"labels": [0], "negative": "blue"}]
)
def test_a_bundle_of_classes_refuses_prompts(service: Client, body: dict[str, Any]) -> None:
    reply = service.post(ROUTE, body)
    assert reply.status == 400
    assert "this bundle takes labels, not prompts" in reply.error
