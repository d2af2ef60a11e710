"""`pipe(…).images`: the call that diffusers' users know, compared with `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from var_deploy.errors import UsageError
from var_deploy.pipeline import Pipeline


class Generator:
    """As much of a `torch.Generator` as is asked for."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def initial_seed(self) -> int:
        return self._seed


@pytest.fixture(scope="module")
def pipe(pocket_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(pocket_bundle, threads=1) as loaded:
        yield loaded


def test_pil_images(pipe: Pipeline) -> None:
    (image,) = pipe(class_labels="star", seed=7).images
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image), pipe.generate(["star"], 7)[0])


def test_images_of_one_label_stand_in_a_row(pipe: Pipeline) -> None:
    found = pipe(
        class_labels=["star", 3],
        num_images_per_prompt=2,
        guidance_scale=2.5,
        generator=Generator(5),
        output_type="np",
    ).images
    expected = pipe.generate(["star", "star", 3, 3], 5, cfg=1.5)
    np.testing.assert_array_equal(found, expected)


def test_one_generator_per_image_and_no_label(pipe: Pipeline) -> None:
    generators = [Generator(9), Generator(2)]
    found = pipe(num_images_per_prompt=2, generator=generators, output_type="np").images
    np.testing.assert_array_equal(found, pipe.generate([None], [9, 2]))


@pytest.mark.parametrize("scale", [0.5, 1])
def test_a_small_guidance_scale_is_none(pipe: Pipeline, scale: float) -> None:
    found = pipe(class_labels=4, guidance_scale=scale, output_type="np").images
    np.testing.assert_array_equal(found, pipe.generate([4], cfg=0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompt": "a red star"}, "takes labels, not prompts"),
        ({"output_type": "latent"}, "output_type is pil or np, found 'latent'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be 1 or more, found 0"),
        ({"guidance_scale": 3.0, "cfg": 2.0}, "two ways to say one thing"),
    ],
)
def test_what_is_refused(pipe: Pipeline, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(**words)


def test_prompts(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")
    from text_case import export_text_bundle

    with Pipeline.load(export_text_bundle(tmp_path_factory.mktemp("text")), threads=1) as pipe:
        found = pipe("a cat", negative_prompt="a dog", guidance_scale=4, output_type="np").images
        expected = pipe.generate(prompts=["a cat"], negative="a dog", cfg=4)
        np.testing.assert_array_equal(found, expected)
        both = pipe(["a cat", "a cow"], num_images_per_prompt=2, output_type="np").images
        expected = pipe.generate(prompts=["a cat", "a cat", "a cow", "a cow"])
        np.testing.assert_array_equal(both, expected)
        with pytest.raises(UsageError, match="takes prompts"):
            pipe(class_labels=3)
