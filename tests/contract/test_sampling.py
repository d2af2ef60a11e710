"""Sampling settings and the random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from var_deploy.errors import UsageError
from var_deploy.sampling import MAX_SEED, Sampling, check_seed, uniforms


@pytest.mark.parametrize(
    "wrong",
    [
        {"cfg": math.nan},
        {"cfg": math.inf},
        {"cfg": -0.1},
        {"cfg": "4"},
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
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=name):
        Sampling().replace(**wrong)


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


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, "7", True, None])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(UsageError, match="seed"):
        check_seed(seed)


def test_good_seeds() -> None:
    assert [check_seed(s) for s in (0, MAX_SEED, np.uint64(3))] == [0, MAX_SEED, 3]


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
