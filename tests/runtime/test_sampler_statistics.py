"""Frequencies of the drawn codes and bits, and what uniforms at the very ends of [0, 1) draw."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_infinity import folder_of, load_case
from numpy.typing import NDArray
from text_case import text_model

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.config import GraphForm
from var_deploy.manifest import read_manifest
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.loop import Answer, ScaleLoop
from var_deploy.sampling import BitSampling, Sampling, uniforms
from var_deploy.spec import ModelSpec

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")

Array = NDArray[Any]
DRAWS = 20_000
CODES = 120  # no square, so that the last row of the inverse CDF is padded
FIRST, LAST = np.float32(0), np.float32(1 - 2.0**-24)  # the ends of what `uniforms` gives
UNLIKELY = 1e-4  # seeds are fixed: a right sampler passes for good


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(χ² ≥ statistic), the regularised Q(a, x) with a = degrees/2, x = statistic/2.

    For whole and half a it is a finite sum: Q(a + 1, x) = Q(a, x) + x^a·e^-x / Γ(a + 1)
    (DLMF 8.8.6), from Q(1, x) = e^-x or Q(1/2, x) = erfc(√x).
    """
    x = statistic / 2
    a = 1 - degrees % 2 / 2
    tail = math.exp(-x) if a == 1 else math.erfc(math.sqrt(x))
    while a < degrees / 2:
        tail += math.exp(a * math.log(x) - x - math.lgamma(a + 1)) if x else 0.0
        a += 1
    return tail


def likelihood(tokens: Array, probabilities: Array) -> float:
    """How often a sampler of these probabilities fits its own draws no better than these.

    Codes expected fewer than five times count as one. 0 where a code without probability came up.
    """
    counts = np.bincount(tokens.ravel(), minlength=len(probabilities)).astype(np.float64)
    expected = probabilities * counts.sum()
    if counts[probabilities == 0].any():
        return 0.0
    rare = expected < 5
    pairs = list(zip(counts[~rare], expected[~rare], strict=True))
    if expected[rare].sum() > 0:
        pairs.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    return chi_square_tail(statistic, len(pairs) - 1) if len(pairs) > 1 else 1.0


@pytest.mark.parametrize(
    ("statistic", "degrees", "tail"),
    [(3.841, 1, 0.05), (5.991, 2, 0.05), (18.307, 10, 0.05), (76.154, 50, 0.01), (0.0, 7, 1.0)],
)
def test_the_tail_is_that_of_the_tables(statistic: float, degrees: int, tail: float) -> None:
    assert chi_square_tail(statistic, degrees) == pytest.approx(tail, abs=2e-5)


class OneScale:
    """Ends every run after its first scale."""

    def after_scale(self, done: int) -> Answer:
        return Answer.DECODE

    def after_decoder(self) -> None:
        pass


@cache
def session(length: int, codes: int) -> Any:
    """A graph of the sampler alone."""
    from var_deploy.export.graphs.builder import GraphBuilder
    from var_deploy.export.graphs.sampler import sample

    b = GraphBuilder("sampler", GraphForm(precision="fp32"))
    inputs = (
        b.input(names.LOGITS, np.float32, (1, length, codes)),
        b.input(names.UNIFORMS, np.float32, (1, length)),
        b.input(names.TEMPERATURE, np.float32, ()),
        b.input(names.TOP_K, np.int64, ()),
        b.input(names.TOP_P, np.float32, ()),
    )
    b.op("Identity", sample(b, *inputs, length=length, codes=codes), out=names.TOKENS)
    b.output(names.TOKENS, np.int64, (1, length))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = b.model(lambda name: (name, 0, 0)).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(logits_LV: Array, uniforms_L: Array, top_k: int, top_p: float) -> Array:
    """Tokens [L]."""
    given = {
        names.LOGITS: logits_LV[None].astype(np.float32),
        names.UNIFORMS: uniforms_L[None].astype(np.float32),
        names.TEMPERATURE: np.array(1, np.float32),
        names.TOP_K: np.array(top_k, np.int64),
        names.TOP_P: np.array(top_p, np.float32),
    }
    tokens: Array = session(*logits_LV.shape).run([names.TOKENS], given)[0][0]
    return tokens


def filtered(logits: Array, top_k: int, top_p: float) -> Array:
    """Probabilities by the published filter."""
    from var_deploy.export.models.sampler import filter_logits

    kept = filter_logits(torch.from_numpy(logits), top_k, top_p)
    probabilities: Array = kept.double().softmax(-1).numpy()
    return probabilities


@pytest.mark.parametrize("top_k", [0, 1, 50])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.96])
def test_frequencies_fit_the_filtered_distribution(top_k: int, top_p: float) -> None:
    row = 1.5 * np.random.default_rng(1).standard_normal(CODES).astype(np.float32)
    probabilities = filtered(row, top_k, top_p)
    draws = uniforms(23, 0, DRAWS)
    tokens = np.concatenate(
        [run(np.tile(row, (2000, 1)), part, top_k, top_p) for part in np.split(draws, 10)]
    )
    assert likelihood(tokens, probabilities) > UNLIKELY
    if top_k == 1:
        assert (tokens == row.argmax()).all()
        return
    # the test could tell another filter, and another temperature
    for other in (
        filtered(row, 20, top_p),
        filtered(row, top_k, 0.8),
        filtered(row / 1.1, top_k, 0),
    ):
        assert likelihood(tokens, other) < UNLIKELY


def test_the_images_of_a_bundle_are_independent_draws(
    family_member: Callable[..., ModelSpec],
    random_model: Callable[[ModelSpec], Any],
    tmp_path: Path,
) -> None:
    """The first token of image n takes the first uniform of stream n: 20 000 streams."""
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.assemble import build_modules
    from var_deploy.export.verify.reference import trace_generation

    batch, label, seed = 1000, 3, 5
    sampling = Sampling(cfg=(1.5, 0.0, 0.0), top_k=40, top_p=0.9, temperature=6.0)
    model = random_model(family_member(vocab_size=CODES))
    total = model.spec.total_tokens
    draws = uniforms(seed, 0, total)[None]
    trace = trace_generation(*build_modules(model), [label], draws, sampling, True)
    logits = trace.scales[0].outputs[names.LOGITS][0, 0]
    at = sampling.at(0, model.spec.scales)
    probabilities = filtered(logits / at.temperature, at.top_k, at.top_p)
    assert np.count_nonzero(probabilities) > 10, "or there would be little to count"

    export_bundle(model, tmp_path / "b", ExportOptions(batch=batch, layout="shared"))
    loop = ScaleLoop(
        tmp_path / "b", read_manifest(tmp_path / "b"), OrtCpuBackend(1), "fp32", "shared"
    )
    try:
        tokens = []
        for first in range(0, DRAWS, batch):
            given = np.stack([uniforms(seed, first + n, total) for n in range(batch)])
            loop.run([label] * batch, given, sampling, OneScale())
            tokens.append(loop.tokens()[0])
    finally:
        loop.close()
    assert likelihood(np.concatenate(tokens), probabilities) > UNLIKELY
    unguided = dataclasses.replace(sampling, cfg=0.0)
    trace = trace_generation(*build_modules(model), [label], draws, unguided, True)
    other = filtered(
        trace.scales[0].outputs[names.LOGITS][0, 0] / at.temperature, at.top_k, at.top_p
    )
    assert likelihood(np.concatenate(tokens), other) < UNLIKELY


def hard_rows(codes: int) -> Array:
    """[L, V] logits that leave little room: ties everywhere, at both ends, and one code alone."""
    rng = np.random.default_rng(codes)
    rows = [np.zeros(codes), np.where(np.arange(codes) % 3 == 1, 2.0, -9.0)]
    for only in (0, codes // 2, codes - 1):  # exp underflows for all others
        rows.append(np.where(np.arange(codes) == only, 0.0, -1e4))
        rows.append(np.where(np.arange(codes) == only, 50.0, rng.standard_normal(codes)))
    rows.append(np.round(2 * rng.standard_normal(codes)))
    rows.append(np.where(np.arange(codes) < codes - 2, 1.0, -3.0))
    rows.append(np.where(np.arange(codes) < 2, -3.0, 1.0))
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("codes", [2, 5, 7, 97, 120, 4095, 4096])
@pytest.mark.parametrize("uniform", [FIRST, LAST])
def test_the_ends_of_the_interval_draw_no_filtered_code(codes: int, uniform: Any) -> None:
    rows = hard_rows(codes)
    draws = np.full(len(rows), uniform)
    for top_k, top_p in ((0, 0.0), (1, 0.0), (3, 0.0), (0, 0.5), (0, 0.96), (2, 0.3), (900, 1.0)):
        tokens = run(rows, draws, top_k, top_p)
        probabilities = filtered(rows, top_k, top_p)
        kept = probabilities > 0
        if top_p:  # where logits are equal all stay, whatever the published sort puts first
            lowest = np.where(kept, rows, np.inf).min(-1, keepdims=True)
            kept = rows >= lowest
        assert kept[np.arange(len(rows)), tokens].all(), (top_k, top_p)
        # and where every kept code has a mass that counts, the outermost of them
        plain = np.where(probabilities > 0, probabilities, 1).min(-1) > 1e-5
        plain &= (kept == (probabilities > 0)).all(-1)
        end = 0 if uniform == FIRST else -1
        expected = [np.flatnonzero(row)[end] for row in kept[plain]]
        assert tokens[plain].tolist() == expected, (top_k, top_p)
        assert plain.any()


# bits


@cache
def bit_session(count: int) -> Any:
    """A graph of the bit sampler alone."""
    from var_deploy.export.graphs.builder import GraphBuilder
    from var_deploy.export.graphs.text_scale import draw_bits

    b = GraphBuilder("bit_sampler", GraphForm(precision="fp32"))
    inputs = (
        b.input(names.LOGITS, np.float32, (1, 1, count)),
        b.input(names.UNIFORMS, np.float32, (1, 1, count)),
        b.input(names.TEMPERATURE, np.float32, ()),
        b.input(names.TOP_P, np.float32, ()),
    )
    b.op("Identity", draw_bits(b, *inputs), out=names.TOKENS)
    b.output(names.TOKENS, np.int64, (1, 1, count))
    model = b.model(lambda name: (name, 0, 0)).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def run_bits(logits: Array, draws: Array, top_p: float, temperature: float = 1.0) -> Array:
    """Bits [N] of logits [N], of 1 over 0."""
    given = {
        names.LOGITS: logits[None, None].astype(np.float32),
        names.UNIFORMS: draws[None, None].astype(np.float32),
        names.TEMPERATURE: np.array(temperature, np.float32),
        names.TOP_P: np.array(top_p, np.float32),
    }
    bits: Array = bit_session(len(logits)).run([names.TOKENS], given)[0][0, 0]
    return bits


def filtered_bits(logits: Array, top_p: float) -> Array:
    """The probability [N] of 1, by the rule as it is published: the less probable value goes where
    its probability is at most 1 - top_p."""
    p1 = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    if not top_p:
        return p1
    least = 1 - top_p + 1e-7  # nothing lies so near to the limit but a tie at 0.5
    return np.where((p1 <= least) & (p1 < 0.5), 0, np.where((1 - p1 <= least) & (p1 >= 0.5), 1, p1))


CHANCES = np.array([0.004, 0.02, 0.035, 0.2, 0.5, 0.75, 0.96, 0.985])
TOP_PS = (0.0, 0.5, 0.9, 0.97, 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_of_bits_fit_their_filtered_probabilities(temperature: float) -> None:
    logits = np.log(CHANCES / (1 - CHANCES))
    draws = uniforms(29, 0, DRAWS * len(CHANCES))
    for top_p in TOP_PS:
        rows = np.tile(logits * temperature, DRAWS)
        bits = run_bits(rows, draws, top_p, temperature).reshape(DRAWS, -1)
        for p1, drawn in zip(filtered_bits(logits, top_p), bits.T, strict=True):
            assert likelihood(drawn, np.array([1 - p1, p1])) > UNLIKELY, (p1, top_p)
            other = p1 + 0.02 if p1 < 0.5 else p1 - 0.02  # which would be told from it
            if 0.01 < p1 < 0.99:
                assert likelihood(drawn, np.array([1 - other, other])) < UNLIKELY, (p1, top_p)


def assert_bits_begin_at(logits: Array, p1: Array, top_p: float) -> None:
    """Bits are 0 just below the uniform 1 - p1, and 1 from just above it on."""
    edge, near = 1 - p1.astype(np.float64), 1e-6
    below, above = edge - near, edge + near
    for draws, expected in ((below, 0), (above, 1)):
        inside = (draws >= 0) & (draws < 1)  # a bit that is certain has one side alone
        found = run_bits(logits, np.clip(draws, FIRST, LAST), top_p)
        np.testing.assert_array_equal(found[inside], expected, err_msg=f"top_p {top_p}")
    certain = (p1 == 0) | (p1 == 1)
    for end in (FIRST, LAST):
        found = run_bits(logits, np.full(len(logits), end), top_p)
        np.testing.assert_array_equal(found[certain], p1[certain], err_msg=f"top_p {top_p}")


def test_a_bit_turns_at_its_filtered_probability() -> None:
    odds = np.array([*np.linspace(-6, 6, 49), 0.0, 1e-3, -1e-3])
    for top_p in TOP_PS:
        p1 = filtered_bits(odds, top_p)
        assert_bits_begin_at(odds, p1, top_p)
        assert ((p1 == 0) | (p1 == 1)).any() == (0 < top_p < 1)
    assert filtered_bits(np.zeros(1), 0.5) == 1, "a tie keeps 1"
    with pytest.raises(AssertionError, match=r"top_p 0\.97"):
        assert_bits_begin_at(odds, filtered_bits(odds, 0.9), 0.97)


@pytest.mark.parametrize("name", ["tiny-square", "tiny-wide"])
def test_a_bit_turns_at_the_published_probability(name: str) -> None:
    if not folder_of(name).is_dir():
        pytest.skip(f"{name} is not here: it holds weights and is not in the repository")
    golden = load_case(folder_of(name)).golden
    pairs = golden["filter.logits"].reshape(-1, 2).astype(np.float64)
    # top-k of 0, 2 and more keep both values of a bit; 1 has no setting in the graphs
    for key in [key for key in golden if key.startswith(("filter.p1.k0.", "filter.p1.k900."))]:
        top_p = float(key.partition(".p1.k")[2].partition(".p")[2])
        assert_bits_begin_at(pairs[:, 1] - pairs[:, 0], golden[key].ravel(), top_p)


def test_the_bits_of_a_bundle_are_independent_draws(tmp_path: Path) -> None:
    """The first token of image n takes the first uniforms of stream n; all have one prompt."""
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.drawn_prompts import drawn_prompts
    from var_deploy.export.verify.graph_runner import GraphRunner
    from var_deploy.export.verify.text_reference import TextInputs, trace_text_reference

    batch, count, seed = 500, 4000, 5
    sampling = BitSampling(cfg=2.0, top_p=0.9, temperature=(6.0, 1.0, 1.0))
    model, graph = text_model(16), names.scale_graph(0)
    options = ExportOptions(batch=batch, guidance=None, layout="per-scale")
    exported = export_bundle(model, tmp_path / "b", options)
    prompt = drawn_prompts(model.spec.transformer, [(3, 3)])
    inputs = TextInputs(conditions=prompt, uniforms=uniforms(seed, 0, model.spec.draws)[None])

    def reference(settings: BitSampling) -> tuple[dict[str, Array], Array]:
        """The inputs of scale 0 of one image, and the probabilities of its bits."""
        manifest = dataclasses.replace(exported, defaults=settings)
        found = trace_text_reference(model, manifest, seed, inputs)
        logits = found.trace.scales[0].outputs[names.LOGITS][0, 0]
        return found.graph_inputs(manifest, graph), filtered_bits(logits / 6, settings.top_p)

    one, expected = reference(sampling)
    # conditional rows of all images, then unconditional ones
    rows = {name: array.repeat(batch, 0) if array.ndim else array for name, array in one.items()}
    files = BundleFiles(tmp_path / "b", exported, "fp32")
    runner, drawn = GraphRunner(files.graph(graph), exported.graph("fp32", graph)), []
    for first in range(0, count, batch):
        given = [uniforms(seed, first + n, 4).reshape(1, 4) for n in range(batch)]
        drawn.append(runner.run({**rows, names.UNIFORMS: np.stack(given)})[names.TOKENS][:, 0])
    bits = np.concatenate(drawn).T

    def fits(probabilities: Array) -> list[float]:
        pairs = zip(bits, probabilities, strict=True)
        return [likelihood(row, np.array([1 - p1, p1])) for row, p1 in pairs]

    assert ((expected > 0.1) & (expected < 0.9)).sum() >= 2, "or there would be little to count"
    assert min(fits(expected)) > UNLIKELY
    _, unguided = reference(dataclasses.replace(sampling, cfg=1.0))
    assert min(fits(unguided)) < UNLIKELY
