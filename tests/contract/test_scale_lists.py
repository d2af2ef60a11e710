"""The scale lists of Infinity against the published table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from var_deploy import scale_lists
from var_deploy.errors import UsageError
from var_deploy.scale_lists import (
    RESOLUTIONS,
    aspects,
    nearest,
    parse_scales,
    scale_list,
    with_scales,
)
from var_deploy.spec import BitTokenizerSpec, TextModelSpec, TextTransformerSpec

PUBLISHED = Path(__file__).parents[1] / "golden-infinity" / "schedules.json.gz"


def published() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(gzip.decompress(PUBLISHED.read_bytes()))
    return table


def test_every_list_is_the_published_one() -> None:
    table = published()
    assert list(aspects().values()) == [float(name) for name in table]  # in the published order
    for aspect, name in zip(aspects(), table, strict=True):
        scales = tuple((rows, columns) for rows, columns in table[name]["scales"])
        assert table[name]["count"] == RESOLUTIONS
        for resolution, count in RESOLUTIONS.items():
            found = scale_list(resolution, aspect)
            assert found.grids == scales[:count], (aspect, resolution)
            assert found.rope_grid == scales[-1]
            assert found.image_size == tuple(table[name]["pixel"][resolution])


def test_every_list_makes_a_model() -> None:
    spec = small_spec()
    for aspect in aspects():
        for resolution in RESOLUTIONS:
            found = with_scales(spec, scale_list(resolution, aspect), 64)
            assert found.scales == RESOLUTIONS[resolution]
            assert found.tokenizer.image_size == scale_list(resolution, aspect).image_size
            assert found.transformer.text_length == 64
    square = with_scales(spec, scale_list("0.06M"), 64)
    assert (square.total_tokens, square.prefix_lengths[-2]) == (521, 265)


def small_spec() -> TextModelSpec:
    return TextModelSpec(
        tokenizer=BitTokenizerSpec(grids=((1, 1),), bits=8, base_width=32),
        transformer=TextTransformerSpec(
            depth=1,
            width=32,
            heads=1,
            ffn_width=64,
            text_width=32,
            text_length=8,
            pool_heads=1,
            rope_grid=(1, 1),
        ),
    )


def test_an_aspect_is_a_ratio() -> None:
    assert scale_list("1M", "1024:768") == scale_list("1M", "4:3")
    assert scale_list("1M", "4:3").grids[-1] == (54, 72)  # wide: fewer rows than columns
    assert str(scale_list("1M", "4:3")) == "1M at 4:3 (1152x864)"


@pytest.mark.parametrize(
    "aspect", ["", "1", "4x3", "4:", ":3", "0:1", "1:0", "-4:3", "4:3:2", "²:3"]
)
def test_what_is_no_aspect_is_refused(aspect: str) -> None:
    with pytest.raises(UsageError, match="aspect must be W:H"):
        scale_list("1M", aspect)


def test_an_aspect_without_a_list_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"aspect 16:9; the nearest is 7:4, expected one of 1:1"):
        scale_list("1M", "16:9")
    with pytest.raises(UsageError, match=r"the nearest is 1:3"):
        scale_list("1M", "1:9")


def test_a_resolution_without_a_list_is_refused() -> None:
    with pytest.raises(UsageError, match=r"one of 0\.06M, 0\.25M, 0\.60M, 1M, or WxH in .* '2M'"):
        scale_list("2M")


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1024, 1024, "1M at 1:1 (1024x1024)"),
        (512, 512, "0.25M at 1:1 (512x512)"),
        (1920, 1080, "1M at 7:4 (1344x768)"),
        (640, 480, "0.25M at 4:3 (576x432)"),
        (480, 640, "0.25M at 3:4 (432x576)"),
        (1, 1, "0.06M at 1:1 (256x256)"),
        (100_000, 10, "1M at 3:1 (1776x592)"),
    ],
)
def test_the_nearest_list_of_a_size(width: int, height: int, expected: str) -> None:
    assert str(nearest(height, width)) == expected


def test_every_list_is_the_nearest_to_its_own_size() -> None:
    for aspect in aspects():
        for resolution in RESOLUTIONS:
            found = scale_list(resolution, aspect)
            assert nearest(*found.image_size) == found


def test_the_earlier_aspect_is_taken_at_a_tie() -> None:
    # h/w 1.125 is as far from 1 as from 1.25
    assert nearest(1125, 1000).aspect == "1:1"


def test_a_size_below_one_pixel_is_refused() -> None:
    with pytest.raises(UsageError, match=r"at least 1x1 pixels, found 0x5"):
        nearest(5, 0)


def test_what_a_user_asks_for() -> None:
    assert parse_scales("0.25M") == scale_list("0.25M")
    assert parse_scales("0.25M", "4:3") == scale_list("0.25M", "4:3")
    assert parse_scales("1920x1080") == scale_list("1M", "7:4")
    with pytest.raises(UsageError, match=r"the size 640x480 has an aspect of its own"):
        parse_scales("640x480", "4:3")
    for wrong in ("640x", "x480", "640×480", "1000000x2", "-1x2", ""):
        with pytest.raises(UsageError, match="resolution must be one of"):
            parse_scales(wrong)
    with pytest.raises(UsageError, match="at least 1x1 pixels, found 0x0"):
        parse_scales("0x0")


def test_the_names_of_resolutions_are_their_pixels_at_1_1() -> None:
    for resolution in scale_lists.RESOLUTIONS:
        height, width = scale_list(resolution).image_size
        assert height * width / 1e6 == pytest.approx(float(resolution[:-1]), abs=0.05)
