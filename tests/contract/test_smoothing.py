"""More smooth sampling in the contract: its two numbers a scale, its noise, and the manifest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from var_deploy.manifest import read_manifest
from var_deploy.sampling import MAX_SEED, gumbel, smoothing, uniforms


def test_factor_and_tau_of_the_released_models() -> None:
    """By hand, from the published code: K = 10."""
    assert smoothing(0, 10) == (1.0, 0.27)
    assert smoothing(3, 10) == pytest.approx((4 / 3, 0.27 * (1 - 0.95 / 3)), rel=1e-12)
    assert smoothing(9, 10) == pytest.approx((2.0, 0.0135), rel=1e-12)
    assert smoothing(1, 2) == smoothing(0, 1), "a single scale is the last"


def test_noise_belongs_to_seed_and_image() -> None:
    first = gumbel(7, 2, 5, 11)
    assert (first.shape, first.dtype) == ((5, 11), np.float32)
    np.testing.assert_array_equal(gumbel(7, 2, 5, 11), first)
    np.testing.assert_array_equal(gumbel(7, 2, 3, 11), first[:3])
    for other in (gumbel(8, 2, 5, 11), gumbel(7, 3, 5, 11)):
        assert not (other == first).any()
    assert np.isfinite(gumbel(MAX_SEED, 2**40, 1, 3)).all()


def test_the_noise_of_a_seed_does_not_change() -> None:
    found = gumbel(0, 0, 1, 4)[0]
    np.testing.assert_allclose(found, [1.123965, -0.069909, -0.694622, 0.596465], atol=1e-6)


def test_noise_is_not_made_of_the_uniforms() -> None:
    u = uniforms(3, 0, 20_000).astype(np.float64)
    g = gumbel(3, 0, 20_000, 1)[:, 0].astype(np.float64)
    assert abs(np.corrcoef(u, np.exp(-np.exp(-g)))[0, 1]) < 0.03


def test_noise_is_gumbel() -> None:
    """Kolmogorov: beyond 1.95/sqrt(n) once in a thousand runs, and the seed is fixed."""
    g = np.sort(gumbel(1, 0, 100, 1000).ravel().astype(np.float64))
    share = np.arange(len(g)) / len(g)
    assert np.abs(np.exp(-np.exp(-g)) - share).max() < 1.95 / len(g) ** 0.5
    assert np.abs(np.exp(-np.exp(-g / 1.02)) - share).max() > 1.95 / len(g) ** 0.5
    assert -2.9 < g[0] < -2 and 9 < g[-1] < 16.7


def test_a_manifest_says_it_and_an_older_reader_refuses(bundle: Path) -> None:
    plain = read_manifest(bundle)
    assert not plain.more_smooth
    data = json.loads((bundle / "manifest.json").read_text())
    assert "more_smooth" not in json.loads(plain.to_json()), "as it was before there was such a way"
    assert data["schema_version"] == 1
    dataclasses.replace(plain, more_smooth=True).save(bundle)
    data = json.loads((bundle / "manifest.json").read_text())
    assert (data["more_smooth"], data["schema_version"]) == (True, 2)
    again = read_manifest(bundle)
    assert again.more_smooth and again.digest() == plain.digest()
