"""Sampling settings and the random numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from var_deploy.errors import LabelError, UsageError
from var_deploy.sampling import (
    MAX_SEED,
    Sampling,
    ScaleSampling,
    call_keys,
    check_seed,
    image_seeds,
    numbered,
    parse_seeds,
    parse_setting,
    series,
    uniforms,
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cfg": math.nan},
        {"cfg": math.inf},
        {"cfg": -0.1},
        {"cfg": "4"},
        {"top_k": b"12"},
        {"cfg": True},
        {"top_p": 1.01},
        {"top_p": -0.01},
        {"top_p": math.nan},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": False},
        {"cfg": (1.0, -1.0)},
        {"top_p": [0.5, math.nan]},
        {"top_p": np.array([[0.5], [0.6]])},
        {"temperature": (1.0, 0.0)},
        {"top_k": (1, 2.0)},
        {"top_k": np.array([3.0])},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=name):
        Sampling().replace(**wrong)


def test_a_value_of_a_scale_is_named_with_its_scale() -> None:
    with pytest.raises(UsageError, match=r"top_p of scale 2 must lie between 0 and 1, found 1.5"):
        Sampling(top_p=(0.5, 1.0, 1.5))
    with pytest.raises(UsageError, match=r"top_k of scale 0 must be a whole number, found '9'"):
        Sampling(top_k=("9",))  # type: ignore[arg-type]


def test_edges_are_allowed() -> None:
    Sampling(cfg=0, top_k=0, top_p=0.0)
    Sampling(top_k=np.int64(5), top_p=1, temperature=np.float32(0.5))


def test_replace_ignores_what_is_not_given() -> None:
    base = Sampling(cfg=2.0, top_k=5)
    assert base.replace(cfg=None, top_p=None) == base
    assert base.replace(cfg=0.0) == Sampling(cfg=0.0, top_k=5), "0 is given, None is not"


def test_guidance_grows_to_cfg() -> None:
    strengths = [Sampling(cfg=3.0).guidance(k, 10) for k in range(10)]
    np.testing.assert_allclose(strengths, 3.0 * np.arange(10) / 9)


def test_a_sequence_has_its_own_value_at_each_scale() -> None:
    sampling = Sampling(cfg=[3, 0, 1.5], top_k=(5, 0, 7), temperature=np.array([1.0, 0.5, 2.0]))
    assert sampling.at(0, 3) == ScaleSampling(guidance=3, temperature=1, top_k=5, top_p=0.95)
    assert sampling.at(1, 3) == ScaleSampling(guidance=0, temperature=0.5, top_k=0, top_p=0.95)
    assert sampling.at(2, 3) == ScaleSampling(guidance=1.5, temperature=2, top_k=7, top_p=0.95)
    assert sampling.cfg == (3.0, 0.0, 1.5)
    assert Sampling(top_k=range(3)) == Sampling(top_k=(0, 1, 2))  # type: ignore[arg-type]
    assert hash(sampling) == hash(dataclasses.replace(sampling))


def test_a_number_is_the_same_at_each_scale_but_for_the_ramp_of_cfg() -> None:
    sampling = Sampling(cfg=4.0, top_k=9, top_p=0.5, temperature=0.7)
    for k in range(5):
        assert sampling.at(k, 5) == ScaleSampling(
            guidance=float(k), temperature=0.7, top_k=9, top_p=0.5
        )
    assert sampling.at(0, 1).guidance == 4.0, "a single scale is the last"


@pytest.mark.parametrize("name", ["cfg", "top_k", "top_p", "temperature"])
def test_a_wrong_count_is_told(name: str) -> None:
    sampling = Sampling(**{name: [1, 1, 1]})  # type: ignore[arg-type]
    sampling.check(3)
    with pytest.raises(UsageError, match=f"{name} has 0 values"):
        Sampling(**{name: []}).check(3)  # type: ignore[arg-type]
    for scales in (1, 2, 4):
        with pytest.raises(UsageError, match=rf"{name} has 3 values, .* has {scales} scales?: "):
            sampling.check(scales)
        with pytest.raises(UsageError, match=f"{name} has 3 values"):
            sampling.at(0, scales)


def test_whether_a_setting_guides() -> None:
    assert Sampling(cfg=0.5).guides
    assert Sampling(cfg=(0, 0, 1)).guides
    assert not Sampling(cfg=0).guides
    assert not Sampling(cfg=(0, 0, 0)).guides


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("cfg", "4", 4.0),
        ("cfg", " 1e1", 10.0),
        ("cfg", "1:4", (1.0, 2.0, 3.0, 4.0)),
        ("cfg", "4:1", (4.0, 3.0, 2.0, 1.0)),
        ("cfg", "0, 1,2.5,9", (0.0, 1.0, 2.5, 9.0)),
        ("temperature", "0.5:2", (0.5, 1.0, 1.5, 2.0)),
        ("top_k", "900", 900),
        ("top_k", "10:1", (10, 7, 4, 1)),
        ("top_k", "1:3", (1, 2, 2, 3)),  # from 1, 1.67, 2.33, 3
        ("top_k", "0,0,5,1", (0, 0, 5, 1)),
        ("top_p", "1:0.7", (1.0, 0.9, 0.8, 0.7)),
    ],
)
def test_settings_as_people_write_them(name: str, text: str, expected: object) -> None:
    found = parse_setting(name, text, 4)
    assert found == pytest.approx(expected, abs=1e-12)
    kinds = {type(value) for value in (found if isinstance(found, tuple) else (found,))}
    assert kinds == {int if name == "top_k" else float}


def test_a_ramp_from_0_is_the_published_one() -> None:
    written, published = Sampling(cfg=parse_setting("cfg", "0:4.3", 10)), Sampling(cfg=4.3)
    for k in range(10):
        assert written.at(k, 10) == published.at(k, 10)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cfg", "", "cfg '' is not a number, a ramp such as 1:4, or one value per scale"),
        ("cfg", "strong", "cfg 'strong' is not a number"),
        ("cfg", "1;4", "is not a number"),
        ("cfg", "1,", "is not a number"),
        ("cfg", "1:", "is not a number"),
        ("cfg", "1:2:3", "a ramp has two ends"),
        ("cfg", "1:2,3", "is not a number"),
        ("cfg", "nan:1", "cfg must lie between 0 and 1000"),
        ("cfg", "1:2000", "cfg must lie between 0 and 1000, found 2000"),
        ("cfg", "1,2,3", "cfg has 3 values, but the model has 4 scales"),
        ("cfg", "1,2,3,4,5", "cfg has 5 values"),
        ("cfg", "1,2,3,-4", "cfg of scale 3 must lie between"),
        ("top_k", "2.5", "top_k '2.5' is not a whole number"),
        ("top_k", "0:900", "0 keeps every code"),
        ("top_p", "0.9:0", "0 keeps every code"),
        ("temperature", "0:1", "temperature must lie between 0.001 and 1000, found 0.0"),
    ],
)
def test_settings_that_cannot_be_read(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_setting(name, text, 4)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_texts_give_the_same_settings_again() -> None:
    odd = Sampling(
        cfg=parse_setting("cfg", "1:4.7", 7),
        top_k=(1_000_000, 0, 1, 2, 3, 4, 123_456_789),
        top_p=0.8765432101,
        temperature=(1.0000001, 1, 1, 1, 1, 1, 1 / 3),
    )
    for sampling in (odd, Sampling(), Sampling(top_k=1_000_000)):
        texts = sampling.texts()
        assert Sampling(**{k: parse_setting(k, text, 7) for k, text in texts.items()}) == sampling
    assert str(Sampling(cfg=(0, 1.5))) == "cfg 0,1.5, top-k 900, top-p 0.95, temperature 1"


def test_seeds_between_commas() -> None:
    assert parse_seeds("7") == [7]
    assert parse_seeds(f"3, 1,{MAX_SEED}") == [3, 1, MAX_SEED]
    for text in ("", "1,", "1.5", "1:3", "-1", "1,-1", str(MAX_SEED + 1)):
        with pytest.raises(UsageError, match="seed"):
            parse_seeds(text)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, "7", True, None])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(UsageError, match="seed"):
        check_seed(seed)


def test_good_seeds() -> None:
    assert [check_seed(s) for s in (0, MAX_SEED, np.uint64(3))] == [0, MAX_SEED, 3]


def test_image_i_of_a_call_has_seed_plus_i() -> None:
    assert image_seeds(7) == [7]
    assert image_seeds(7, 3) == [7, 8, 9]
    assert image_seeds(np.uint64(7), 2) == [7, 8]
    assert call_keys(7, 3) == [(7, 0), (8, 0), (9, 0)]
    for i, stream in enumerate(call_keys(7, 3)):
        assert call_keys(7 + i) == [stream], "each can be made again by a call of its own"
    assert image_seeds(MAX_SEED - 1, 2) == [MAX_SEED - 1, MAX_SEED]
    with pytest.raises(UsageError, match=r"the last seed is 2\*\*64 - 1: 2 images from seed"):
        image_seeds(MAX_SEED, 2)
    # a set has one seed, and its images have numbers
    assert numbered(7, 2, 2) == [(7, 2), (7, 3)]


def test_several_seeds_are_one_per_image() -> None:
    assert image_seeds([3, 8, 3]) == image_seeds([3, 8, 3], 3) == [3, 8, 3]
    assert call_keys([3, 8]) == [(3, 0), (8, 0)]
    with pytest.raises(UsageError, match="2 seeds for 3 images: give one, which counts up, or one"):
        image_seeds([3, 8], 3)
    with pytest.raises(UsageError, match="1 seed for 3 images"):
        image_seeds([3], 3)
    with pytest.raises(UsageError, match="seed is empty"):
        image_seeds([])
    with pytest.raises(UsageError, match="seed must be a whole number, found '7'"):
        image_seeds("7", 1)  # type: ignore[arg-type]


def test_labels_and_seeds_of_a_series() -> None:
    assert series(["a"], 7) == (["a"], [7])
    assert series(["a", "b"], 7) == (["a", "b"], [7, 8])
    assert series(["a"], [3, 8]) == (["a", "a"], [3, 8])
    assert series(["a", "b"], 7, 3) == (["a", "b", "a"], [7, 8, 9])
    with pytest.raises(LabelError, match="2 labels for 1 image: give a count of 2 or more"):
        series(["a", "b"], 7, 1)
    with pytest.raises(LabelError, match="no label given"):
        series([], 7)
    with pytest.raises(UsageError, match="count must be a whole number above 0, found 0"):
        series(["a"], 7, 0)


def test_uniforms_are_fixed_for_all_time() -> None:
    """These very numbers make a seed mean the same picture in every version."""
    expected = np.random.Generator(np.random.Philox(key=[7, 2])).random(680)
    drawn = uniforms(7, 2, 680)
    assert drawn.dtype == np.float32
    # Generator.random keeps the top 53 bits of the same stream, `uniforms` the top 24
    np.testing.assert_array_equal(drawn, np.floor(expected * 2**24).astype(np.float32) / 2**24)


def test_uniforms_lie_in_the_half_open_interval() -> None:
    drawn = uniforms(MAX_SEED, 0, 200_000)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(drawn))


def test_every_image_and_seed_has_a_stream_of_its_own() -> None:
    streams = {uniforms(seed, image, 8).tobytes() for seed in range(20) for image in range(20)}
    assert len(streams) == 400
    np.testing.assert_array_equal(uniforms(1, 2, 680)[:100], uniforms(1, 2, 100))
