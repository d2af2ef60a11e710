"""Prompts over HTTP: images, edits and variations of a text-to-image bundle."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_case
from PIL import Image
from serving.client import Client, running

from var_deploy.errors import UsageError
from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

FOX, SEA = "a red fox", "the sea at dawn"


@pytest.fixture(scope="module")
def pipe(text_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(text_bundle, threads=1) as pipeline:
        yield pipeline


def text_of(image: dict[str, Any]) -> dict[str, str]:
    with Image.open(io.BytesIO(base64.b64decode(image["png"]))) as opened:
        text: dict[str, str] = opened.text  # type: ignore[attr-defined]
        return text


def encoded(image: np.ndarray[Any, Any]) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def test_what_the_bundle_takes(service: Client) -> None:
    about = service.get("/v1/model").json
    assert (about["takes"], about["text_length"]) == ("prompts", text_case.TEXT_LENGTH)
    assert (about["height"], about["width"]) == (text_case.HEIGHT, text_case.WIDTH)
    assert about["grids"] == [list(grid) for grid in text_case.GRIDS]
    assert about["side"] is about["patch_nums"] is about["labels"] is None
    assert about["limits"]["prompt"] == 4000
    assert about["defaults"] == {"cfg": 4.0, "top_k": 0, "top_p": 0.97, "temperature": 0.5}


def test_images_are_those_of_generate_and_say_their_prompts(
    service: Client, pipe: Pipeline
) -> None:
    body = {"prompts": [FOX, SEA], "negative": "blue", "count": 3, "seed": 5, "cfg": 2}
    reply = service.post("/v1/images", body)
    expected = pipe.generate(prompts=[FOX, SEA], negative="blue", count=3, seed=5, cfg=2.0)
    np.testing.assert_array_equal(reply.images(), expected)
    images = reply.json["images"]
    assert [image["prompt"] for image in images] == [FOX, SEA, FOX]
    assert reply.json["remarks"] == ["the text encoder does not know: fox"]
    assert reply.json["unknown"] == ["fox"]
    assert expected.origin is not None
    assert text_of(images[1]) == expected.origin.take([1]).text()
    assert text_of(images[1])["prompt"] == SEA and text_of(images[1])["negative"] == "blue"
    one = service.post("/v1/images", {"prompt": "", "seed": 5})
    assert one.json["remarks"] == one.json["unknown"] == []
    np.testing.assert_array_equal(one.images(), pipe.generate(prompts="", seed=5))


def test_requests_with_and_without_a_negative_prompt_go_apart(
    service: Client, pipe: Pipeline, gate: Any
) -> None:
    """Different negative prompts share a launch, none and some do not."""
    bodies = [
        {"prompt": FOX, "seed": 1},
        {"prompt": FOX, "seed": 2, "negative": "blue"},
        {"prompt": SEA, "seed": 3},
        {"prompt": SEA, "seed": 4, "negative": "red"},
    ]
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(service.post, "/v1/images", bodies[0])]
        gate.reached()
        for waiting, body in enumerate(bodies[1:], 1):
            replies.append(pool.submit(service.post, "/v1/images", body))
            service.wait_for("var_deploy_queue_depth", waiting)
        gate.let_go(3)
        found = [reply.result().images() for reply in replies]
    assert [[key[0] for key in request.rng_keys] for request in gate.batches] == [
        [1],
        [2, 4],
        [3],
    ]
    for body, images in zip(bodies, found, strict=True):
        given: dict[str, Any] = {"prompts": body["prompt"], "negative": body.get("negative")}
        np.testing.assert_array_equal(images, pipe.generate(**given, seed=body["seed"]))


def test_edit_and_vary_take_a_prompt(service: Client, pipe: Pipeline) -> None:
    (image,) = pipe.generate(prompts=SEA, seed=9)
    box, half = [0, 0, text_case.WIDTH // 2, text_case.HEIGHT], text_case.WIDTH // 2
    mask = np.zeros((text_case.HEIGHT, text_case.WIDTH), np.bool_)
    mask[:, :half] = True
    picture = encoded(image)
    body = {"image": picture, "box": box, "prompt": FOX, "seed": 3, "keep_pixels": True}
    edited = service.post("/v1/edit", body).images()
    expected = pipe.edit(image, mask, prompt=FOX, seed=3, keep_pixels=True)
    np.testing.assert_array_equal(edited, expected)
    np.testing.assert_array_equal(edited[0][:, half:], image[:, half:])
    body = {"image": picture, "from_scale": 2, "seed": 3, "count": 2}
    varied = service.post("/v1/vary", body).images()
    np.testing.assert_array_equal(varied, pipe.vary(image, 2, seed=3, count=2))


def test_an_edit_shares_a_launch_with_an_image_from_nothing(
    service: Client, pipe: Pipeline, gate: Any
) -> None:
    (image,) = pipe.generate(prompts=SEA, seed=9)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(service.post, "/v1/images", {"prompt": FOX})
        gate.reached()
        body = {"image": encoded(image), "from_scale": 2, "prompt": FOX, "seed": 1}
        varied = pool.submit(service.post, "/v1/vary", body)
        service.wait_for("var_deploy_queue_depth", 1)
        made = pool.submit(service.post, "/v1/images", {"prompt": SEA, "seed": 2})
        service.wait_for("var_deploy_queue_depth", 2)
        gate.let_go(2)
        assert first.result().status == 200
        np.testing.assert_array_equal(
            varied.result().images(), pipe.vary(image, 2, prompt=FOX, seed=1)
        )
        np.testing.assert_array_equal(
            made.result().images(), pipe.generate(prompts=SEA, seed=2)
        )
    assert len(gate.batches) == 2


def test_the_stream_shows_every_scale(service: Client) -> None:
    with service.stream("/v1/images/stream", {"prompt": FOX}) as events:
        names = [name for name, _ in events if name != "queued"]
    assert names == ["scale"] * text_case.SCALES + ["done"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "this bundle takes prompts: send prompts"),
        ({"labels": [0]}, "takes prompts"),
        ({"labels": [0], "prompts": [FOX]}, "takes prompts, not labels"),
        ({"prompt": FOX, "prompts": [FOX]}, "two names of one field"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [None]}, "holds null"),
        ({"prompts": [3]}, "prompts: Input should be a valid string"),
        ({"prompts": [FOX, SEA], "count": 1}, "2 prompts for 1 image"),
        ({"prompts": [FOX] * 7}, "count must lie between 1 and 6, found 7"),
        ({"prompt": "x" * 4001}, "prompt has 4001 characters, at most 4000"),
        ({"prompt": FOX, "negative": "x" * 4001}, "negative has 4001 characters"),
        ({"prompt": "a\0b"}, "character 1 of prompt is the control character U+0000"),
        ({"prompt": FOX, "negative": "\x9b"}, "character 0 of negative"),
        ({"prompt": "a\ud800b"}, "half a surrogate pair"),
        ({"prompt": FOX, "negative": "\udfff"}, "half a surrogate pair"),
        ({"prompt": FOX, "top_k": 3}, "top_k must be 0"),
        ({"prompt": FOX, "text": FOX}, "Extra inputs"),
    ],
)
def test_refusals(
    service: Client,
    pipe: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
    words: str,
) -> None:
    """Before anything waits: what fails at the text encoder fails a launch that others share."""
    monkeypatch.setattr(pipe, "features", None)
    reply = service.post("/v1/images", body)
    assert reply.status == 400
    assert words in reply.error


def test_several_prompts_for_one_picture_are_refused(service: Client) -> None:
    picture = encoded(np.zeros((text_case.HEIGHT, text_case.WIDTH, 3), np.uint8))
    body = {"image": picture, "from_scale": 1, "prompts": [FOX, SEA]}
    reply = service.post("/v1/vary", body)
    assert (reply.status, reply.error.split(":")[0]) == (
        400,
        "prompt takes one text here, found 2",
    )


def test_prompts_of_any_script_and_line_ends_are_taken(service: Client) -> None:
    prompts = ["狐狸 🦊", "two\nlines\tof it", "</s> <extra_id_0>", json.dumps({"a": 1})]
    reply = service.post("/v1/images", {"prompts": prompts})
    assert [image["prompt"] for image in reply.json["images"]] == prompts
    assert text_of(reply.json["images"][0])["prompt"] == prompts[0]


def test_a_bundle_without_its_text_encoder_is_not_served(text_bundle: Path, tmp_path: Path) -> None:
    from var_deploy.serving.app import create_app

    alone = shutil.copytree(text_bundle, tmp_path / "alone")
    words = "give its folder with --text-encoder"
    with Pipeline.load(alone, threads=1) as none, pytest.raises(UsageError, match=words):
        create_app(none)
    encoder = text_bundle.parent / "t5"
    with (
        Pipeline.load(alone, threads=1, text_encoder=encoder) as pipeline,
        running(create_app(pipeline)) as client,
    ):
        assert client.post("/v1/images", {"prompt": FOX}).status == 200
