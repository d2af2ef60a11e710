"""The sampler inside the graphs against the published filter and a float64 inverse CDF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.config import GraphForm, Precision
from var_deploy.export.graphs import sampler
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.sampler import sample
from var_deploy.export.models.sampler import draw, filter_logits
from var_deploy.sampling import uniforms

Array = NDArray[Any]
LAST_UNIFORM = np.float32(1 - 2.0**-24)  # the largest that `uniforms` can give


@cache
def session(precision: Precision, batch: int, length: int, codes: int) -> Any:
    """A graph of nothing but the sampler, with the kept mass brought out."""
    b = GraphBuilder("sampler", GraphForm(precision=precision))
    inputs = (
        b.input(names.LOGITS, np.float32, (batch, length, codes)),
        b.input(names.UNIFORMS, np.float32, (batch, length)),
        b.input(names.TEMPERATURE, np.float32, ()),
        b.input(names.TOP_K, np.int64, ()),
        b.input(names.TOP_P, np.float32, ()),
    )
    b.op("Identity", sample(b, *inputs, length=length, codes=codes), out=names.TOKENS)
    b.output(names.TOKENS, np.int64, (batch, length))
    b.output(names.KEPT_MASS, np.float32, (batch, length, codes))
    assert not b.weights
    model = b.model(lambda name: (name, 0, 0))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(
    logits: Array, draws: Array, top_k: int = 0, top_p: float = 0.0, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Tokens [B, L] and probabilities [B, L, V] of the graph.

    In fp16 graphs the sampler's numbers are fp32 as well, and its passes are wider; the results
    have to be the same.
    """
    given = {
        names.LOGITS: logits.astype(np.float32),
        names.UNIFORMS: draws.astype(np.float32),
        names.TEMPERATURE: np.array(temperature, np.float32),
        names.TOP_K: np.array(top_k, np.int64),
        names.TOP_P: np.array(top_p, np.float32),
    }
    wanted = [names.TOKENS, names.KEPT_MASS]
    tokens, mass = session("fp32", *logits.shape).run(wanted, given)
    for one, other in zip(
        (tokens, mass), session("fp16", *logits.shape).run(wanted, given), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    return tokens, mass / mass.sum(-1, keepdims=True)


def some_logits(codes: int, seed: int = 0, length: int = 6, spread: float = 2.5) -> Array:
    """[2, L, V] fp32."""
    rng = np.random.default_rng(seed)
    return (spread * rng.standard_normal((2, length, codes))).astype(np.float32)


def some_draws(logits: Array, seed: int = 0) -> Array:
    batch, length, _ = logits.shape
    return np.stack([uniforms(seed, i, length) for i in range(batch)])


def expected_filter(
    logits: Array, top_k: int, top_p: float, temperature: float = 1.0
) -> torch.Tensor:
    return filter_logits(torch.from_numpy(logits) / temperature, top_k, top_p)


def on_the_fence(logits: Array, top_k: int, top_p: float) -> Array:
    """Codes whose cumulative probability meets 1 - p to the last digits of an fp32 sum."""
    ascending, order = expected_filter(logits, top_k, 0.0).double().sort(dim=-1)
    near = (ascending.softmax(-1).cumsum(-1) - (1 - top_p)).abs() < 2e-6
    near[..., -1] = False  # the largest always stays
    fence: Array = torch.zeros_like(near).scatter(-1, order, near).numpy()
    return fence if 0 < top_p < 1 else np.zeros_like(fence)


def golden_filters(golden: Any) -> list[tuple[int, float, Array]]:
    """(top_k, top_p, probabilities) of every filter that the golden case holds."""
    cases = []
    for name, probabilities in golden.arrays.items():
        if name.startswith("filter.probs."):
            k, p = name.removeprefix("filter.probs.k").split(".p")
            cases.append((int(k), float(p), probabilities))
    assert len(cases) >= 5
    return cases


def test_published_filter_in_pytorch(golden: Any) -> None:
    logits = torch.from_numpy(golden.arrays["filter.logits"])
    for k, p, expected in golden_filters(golden):
        found = filter_logits(logits, k, p).softmax(-1).numpy()
        np.testing.assert_array_equal(found > 0, expected > 0, err_msg=f"k={k} p={p}")
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0, err_msg=f"k={k} p={p}")


def test_filtering_leaves_its_argument_alone() -> None:
    logits = torch.from_numpy(some_logits(64))
    before = logits.clone()
    filter_logits(logits, 3, 0.5)
    assert torch.equal(logits, before)


def test_published_filter_in_the_graph(golden: Any) -> None:
    logits = golden.arrays["filter.logits"]
    for k, p, expected in golden_filters(golden):
        _, found = run(logits, some_draws(logits), k, p)
        np.testing.assert_array_equal(found > 0, expected > 0, err_msg=f"k={k} p={p}")
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0, err_msg=f"k={k} p={p}")


FILTERS = [
    (0, 0.0),
    (1, 0.0),
    (3, 0.0),
    (0, 0.5),
    (0, 0.96),
    (0, 1e-6),
    (0, 1.0),
    (4, 1.0),
    (4, 0.7),
    (40, 0.9),
    (900, 0.95),
    (5000, 0.3),
    (10**12, 0.0),
]


@pytest.mark.parametrize("codes", [5, 64, 96, 512, 4096])
@pytest.mark.parametrize("spread", [0.3, 2.5, 12.0])
def test_kept_sets_and_tokens(codes: int, spread: float) -> None:
    logits = some_logits(codes, seed=codes, spread=spread)
    decided = 0
    for seed, (k, p) in enumerate(FILTERS):
        what = f"k={k} p={p}"
        draws = some_draws(logits, seed)
        expected = expected_filter(logits, k, p)
        probabilities = expected.softmax(-1).numpy()
        tokens, found = run(logits, draws, k, p)
        firm = ~on_the_fence(logits, k, p)
        assert firm.mean() > 0.95
        kept = np.isfinite(expected.numpy())
        certain = kept & (probabilities > 1e-30)  # fp32 cannot tell the rest from 0
        np.testing.assert_array_equal((found > 0)[firm & ~kept], False, err_msg=what)
        np.testing.assert_array_equal((found > 0)[firm & certain], True, err_msg=what)
        rows = firm.all(-1)
        np.testing.assert_allclose(found[rows], probabilities[rows], atol=1e-5, err_msg=what)
        wanted, margins = draw(expected, torch.from_numpy(draws))
        clear = rows & (margins.numpy() > 1e-5)
        decided += int(clear.sum())
        np.testing.assert_array_equal(tokens[clear], wanted.numpy()[clear], err_msg=what)
        assert (np.take_along_axis(found, tokens[..., None], -1) > 0).all(), what
    assert decided > 0.9 * len(FILTERS) * logits.shape[0] * logits.shape[1]


@pytest.fixture(params=[1, 2, 3, 4])
def bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Passes find this many bits; sessions of another width neither come in nor stay."""
    monkeypatch.setattr(sampler, "_bits", lambda b, elements: request.param)
    session.cache_clear()
    yield request.param
    session.cache_clear()


@pytest.fixture(scope="module")
def filtered() -> list[tuple[Array, Array]]:
    """Tokens and probabilities of every filter, by graphs of the width that is chosen."""
    logits = some_logits(512, seed=7)
    return [run(logits, some_draws(logits), k, p) for k, p in FILTERS]


def test_the_width_of_a_pass_does_not_change_what_is_kept(
    filtered: list[tuple[Array, Array]], bits: int
) -> None:
    logits = some_logits(512, seed=7)
    for (k, p), (tokens, mass) in zip(FILTERS, filtered, strict=True):
        found_tokens, found_mass = run(logits, some_draws(logits), k, p)
        np.testing.assert_array_equal(found_tokens, tokens)
        np.testing.assert_array_equal(found_mass, mass)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2**14), ("fp16", 2**21)])
def test_a_pass_is_as_wide_as_its_elements_allow(precision: Precision, limit: int) -> None:
    b = GraphBuilder("sampler", GraphForm(precision=precision))
    for width in (1, 2, 3, 4):
        most = limit // (2**width - 1)
        assert sampler._bits(b, most) == width
    assert sampler._bits(b, limit) == sampler._bits(b, 100 * limit) == 1


def test_ties_at_the_top_k_threshold_all_stay() -> None:
    logits = np.full((1, 3, 64), -1.0, np.float32)
    logits[0, 0, [3, 9, 40, 63]] = [2.0, 1.0, 1.0, 1.0]  # the second largest three times
    logits[0, 1, :10] = 4.0  # the largest ten times
    expected = expected_filter(logits, 2, 0.0)
    _, found = run(logits, np.zeros((1, 3)), 2)
    np.testing.assert_array_equal(found > 0, np.isfinite(expected.numpy()))
    assert (found > 0).sum(-1).tolist() == [[4, 10, 64]]


def test_a_tie_at_the_top_p_threshold_stays_as_a_whole() -> None:
    """The published code breaks it by the order of its sort, which is nobody's intention."""
    logits = np.zeros((1, 1, 64), np.float32)
    _, found = run(logits, np.zeros((1, 1)), 0, 0.5)
    assert (found > 0).all()


@pytest.mark.parametrize("codes", [5, 96, 4096])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 50.0])
def test_top_1_is_the_argmax(codes: int, temperature: float) -> None:
    logits = some_logits(codes, seed=3, length=40)
    tokens, found = run(logits, some_draws(logits), 1, 0.0, temperature)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert ((found > 0).sum(-1) == 1).all()


def test_top_1_tells_neighbouring_floats_apart(bits: int) -> None:
    even = np.float32(1.5)
    logits = np.full((1, 3, 64), -3.0, np.float32)
    logits[..., 7], logits[..., 30] = np.nextafter(even, np.float32(0)), even
    logits[0, 1, 30] = np.nextafter(even, np.float32(9))
    logits[0, 1, 7] = even
    logits[0, 2, 50] = -1e6  # a wide range is no excuse
    tokens, found = run(logits, np.zeros((1, 3)), 1)
    assert tokens.tolist() == [[30, 30, 30]]
    assert ((found > 0).sum(-1) == 1).all()


@pytest.mark.parametrize("largest", [3e-5, 1.0, 12.7, 30.0])
@pytest.mark.parametrize("part", [1.0, -1.0, 0.03, -0.03, 0.00196, -0.00196])
def test_neighbouring_floats_at_a_threshold_are_told_apart(
    largest: float, part: float, bits: int
) -> None:
    """A threshold of at least 1/512 of the largest logit is found to the last bit."""
    lower = np.float32(part * largest * (1 - 2.0**-12))
    upper = np.nextafter(lower, np.float32(np.inf))
    logits = np.full((1, 1, 64), np.float32(-largest))
    logits[..., :3] = largest
    logits[..., 10], logits[..., 40] = upper, lower
    _, found = run(logits, np.zeros((1, 1)), 4)
    assert np.flatnonzero(found[0, 0]).tolist() == [0, 1, 2, 10]
    # top-p: drops all but the three largest and the one above the threshold
    masses = np.exp(logits[0, 0].astype(np.float64) - largest)
    left = masses[[0, 1, 2]].sum() + masses[10] / 2
    _, found = run(logits, np.zeros((1, 1)), 0, left / masses.sum())
    if masses[10] / masses.sum() > 1e-4:  # else rounding of the sums decides
        assert set(np.flatnonzero(found[0, 0])) == {0, 1, 2, 10}


def test_a_tiny_p_keeps_the_largest_alone() -> None:
    logits = some_logits(512)
    tokens, found = run(logits, some_draws(logits), 0, 1e-30)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert ((found > 0).sum(-1) == 1).all()


def test_p_of_1_keeps_all_that_top_k_left() -> None:
    logits = some_logits(512)
    for k, count in ((0, 512), (20, 20)):
        _, found = run(logits, some_draws(logits), k, 1.0)
        assert ((found > 0).sum(-1) == count).all()


@pytest.mark.parametrize("codes", [5, 96, 4096])
def test_extreme_uniforms_never_draw_a_filtered_code(codes: int) -> None:
    for seed in range(4):
        logits = some_logits(codes, seed, length=32)
        first, last = logits.argsort(-1)[..., 0], logits.argsort(-1)[..., 1]
        # the least likely codes at both ends of the CDF, where rounding would land
        np.put_along_axis(logits, np.zeros_like(first)[..., None], -30.0, -1)
        np.put_along_axis(logits, np.full_like(last, codes - 1)[..., None], -30.0, -1)
        for k, p in ((3, 0.0), (0, 0.9), (4, 0.6)):
            kept = np.isfinite(expected_filter(logits, k, p).numpy())
            for u, end in ((np.float32(0), 0), (LAST_UNIFORM, -1)):
                tokens, _ = run(logits, np.full(logits.shape[:2], u), k, p)
                ends = np.array([np.flatnonzero(row)[end] for row in kept.reshape(-1, codes)])
                np.testing.assert_array_equal(tokens.ravel(), ends)


def test_uniforms_at_the_ends_of_intervals_draw_a_neighbour() -> None:
    """There rounding decides, but only between two codes that were kept."""
    codes, length = 4096, 900
    for seed in range(6):
        row = some_logits(codes, seed, length=1)[:1]
        probabilities = expected_filter(row, 300, 0.0).double().softmax(-1).numpy()[0, 0]
        cdf = probabilities.cumsum()
        ends = cdf[probabilities > 0].astype(np.float32)
        draws = np.concatenate([ends, np.nextafter(ends, np.float32(0)), ends - 2.0**-24])
        draws = np.clip(draws, 0, LAST_UNIFORM)[None]
        assert draws.shape == (1, length)
        tokens, found = run(np.repeat(row, length, axis=1), draws, 300)
        assert (np.take_along_axis(found, tokens[..., None], -1) > 0).all()
        upper = cdf[tokens[0]]
        lower = upper - probabilities[tokens[0]]
        assert ((lower - 1e-6 < draws[0]) & (draws[0] < upper + 1e-6)).all()


def test_temperature_divides_the_logits_before_the_filters() -> None:
    logits = some_logits(96)
    draws = some_draws(logits)
    for temperature in (0.3, 1.0, 2.5):
        expected = expected_filter(logits, 40, 0.8, temperature)
        _, found = run(logits, draws, 40, 0.8, temperature)
        np.testing.assert_array_equal(found > 0, np.isfinite(expected.numpy()))
        np.testing.assert_allclose(found, expected.softmax(-1).numpy(), atol=1e-5)


def chi_square(counts: Array, probabilities: Array) -> float:
    expected = counts.sum() * probabilities
    return float((np.square(counts - expected) / expected).sum())


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (8, 0.0), (0, 0.95)])
def test_frequencies_over_20_000_draws(top_k: int, top_p: float) -> None:
    # 11 degrees of freedom at most: beyond 45 once in 200 000 runs (and the seed is fixed)
    limit, count, codes = 45.0, 20_000, 12
    row = some_logits(codes, seed=5, length=1, spread=1.0)[:1]
    logits = np.repeat(row, count, axis=1)

    def distribution(temperature: float) -> Callable[[Array], float]:
        p = expected_filter(row, top_k, top_p, temperature).double().softmax(-1).numpy()[0, 0]
        return lambda counts: chi_square(counts[p > 0], p[p > 0])

    tokens, found = run(logits, uniforms(11, 0, count)[None], top_k, top_p)
    counts = np.bincount(tokens.ravel(), minlength=codes).astype(np.float64)
    assert counts[found[0, 0] == 0].sum() == 0
    assert distribution(1.0)(counts) < limit
    if not top_p:  # the test could tell a temperature that is off by a tenth
        assert distribution(1.1)(counts) > limit
