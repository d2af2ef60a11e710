"""Images that a pipeline returned, saved from Python as the command line saves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from var_deploy.cli import main
from var_deploy.errors import UsageError
from var_deploy.image.images import read_settings
from var_deploy.pipeline import Pipeline, Sizes
from var_deploy.runtime.generated import Images

SIDE = 8


@pytest.fixture(scope="module")
def folder(export_to: Callable[..., Path]) -> Path:
    return export_to(batch=2)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.load(folder, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def images(pipe: Pipeline) -> Images:
    return pipe.generate(["star", 3], seed=7, count=4, cfg=1.5)


def test_the_file_is_that_of_the_command_line(
    folder: Path, images: Images, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "deep" / "a.png", tmp_path / "b.png"
    images.save(ours)
    words = ["generate", str(folder), "--labels", "star,3", "--count", "4", "--seed", "7"]
    words += ["--cfg", "1.5", "--threads", "1", "--quiet", "--out", str(theirs)]
    main(words, standalone_mode=False)
    assert ours.read_bytes() == theirs.read_bytes()
    assert read_settings(ours)["seed"] == "7,8,9,10"


def test_one_image_has_its_own_settings(pipe: Pipeline, images: Images, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    for one in (images[3], images[-1], images[3:], images[1:][2]):
        one.save(str(path))
        told = read_settings(path)
        assert (told["seed"], told["labels"], told["cfg"]) == ("10", "3 tree", "1.5")
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), images[3])
    again = pipe.generate([3], seed=10, cfg=1.5)
    assert np.abs(again[0].astype(int) - images[3]).max() <= 1
    assert not images[:2].scales_done.size


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".PNG"])
def test_the_suffix_decides(images: Images, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    images.save(path, columns=4)
    assert read_settings(path)["labels"] == "0 star, 3 tree, 0 star, 3 tree"
    with Image.open(path) as image:
        assert image.size == (4 * SIDE + 6, SIDE)


def test_what_edits_and_variations_say(pipe: Pipeline, images: Images, tmp_path: Path) -> None:
    start, out = tmp_path / "start.png", tmp_path / "x.png"
    images[0].save(start)
    mask = np.ones((SIDE, SIDE), bool)
    made = pipe.edit(start, mask, "tree", seed=5, count=3, keep_pixels=True)
    made.save(out)
    told = read_settings(out)
    assert (told["seed"], told["picture"], told["keep_pixels"]) == ("5,6,7", "start.png", "yes")
    alone = pipe.edit(start, mask, "tree", seed=7, keep_pixels=True)
    assert np.abs(alone[0].astype(int) - made[2]).max() <= 1
    made = pipe.vary(images[0], 1, seed=5, count=3, deadline=100)
    made[1:].save(out)
    told = read_settings(out)
    assert (told["seed"], told["from_scale"]) == ("6,7", "1")
    assert (told["labels"], told["scales_done"]) == ("none, none", "3,3 of 3")
    alone = pipe.vary(images[0], 1, seed=7)
    assert np.abs(alone[0].astype(int) - made[2]).max() <= 1


def test_pil_images_are_copies(images: Images) -> None:
    pictures = images.pil()
    assert [(p.size, p.mode) for p in pictures] == [((SIDE, SIDE), "RGB")] * 4
    np.testing.assert_array_equal(np.asarray(pictures[2]), images[2])
    assert len(images[2].pil()) == 1
    assert [p.mode for p in images[..., :1].pil()] == ["L"] * 4


def test_computed_arrays_have_no_settings(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "dark.png"
    (images // 2).save(path)
    assert read_settings(path) == {}


@pytest.mark.parametrize(
    ("change", "name", "part"),
    [
        (lambda images: images, "x.gif", "images are written as .png, .jpg, .jpeg or .webp"),
        (lambda images: images / 2, "x.png", r"found float64 \[4, 8, 8, 3\]"),
        (lambda images: images[..., 0], "x.png", r"found uint8 \[4, 8, 8\]"),
        (lambda images: images[:0], "x.png", "there are no images"),
    ],
)
def test_what_cannot_be_saved(
    images: Images, tmp_path: Path, change: Callable[[Any], Any], name: str, part: str
) -> None:
    with pytest.raises(UsageError, match=part):
        change(images).save(tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_labels_and_sizes(pipe: Pipeline) -> None:
    assert pipe.labels == ("star", "heart", "house", "tree", "fish")
    tokenizer = pipe.manifest.model.tokenizer
    assert pipe.sizes == Sizes(
        height=SIDE,
        width=SIDE,
        channels=3,
        grids=((1, 1), (2, 2), (4, 4)),
        tokens=21,
        codes=tokenizer.token_values,
        bits=0,
        classes=5,
        text_length=0,
        batch=2,
    )
    assert (pipe.sizes.side, pipe.sizes.scales) == (SIDE, (1, 2, 4))
