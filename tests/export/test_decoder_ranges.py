"""The ranges that an int8 decoder rounds to: seen on images of the model's own, and repeatable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from golden_infinity import OWN, load_case

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.errors import UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules
from var_deploy.export.checkpoint.presets import PRESETS, TEXT_PRESETS
from var_deploy.export.graphs.bit_codec import build_bit_decoder
from var_deploy.export.graphs.codec import build_decoder
from var_deploy.export.int8 import decoder_noise
from var_deploy.export.int8 import decoder_ranges as watching
from var_deploy.export.int8.decoder_noise import within_bound
from var_deploy.export.int8.decoder_ranges import decoder_ranges, rounded_convs
from var_deploy.export.int8.operators import ConvRanges, Range
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.spec import BitTokenizerSpec

STEP = 2 ** (1 / watching.STEPS_AN_OCTAVE)


@pytest.fixture(scope="module")
def model(small_model: Callable[..., LoadedModel]) -> LoadedModel:
    return small_model()


@pytest.fixture(scope="module")
def exported(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batches of two."""
    out = tmp_path_factory.mktemp("ranges") / "bundle"
    export_bundle(model, out, ExportOptions(precisions=("int8",), batch=2, layout="shared"))
    return out


@pytest.fixture(scope="module")
def manifest(exported: Path) -> Manifest:
    return read_manifest(exported)


def test_ranges_cover_what_the_decoder_sees(
    exported: Path, manifest: Manifest, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[Any]] = []

    def drawn(*arguments: Any) -> Any:
        batches.append(draw(*arguments))
        return batches[-1]

    draw = watching._draw
    monkeypatch.setattr(watching, "_draw", drawn)
    told: list[tuple[int, int]] = []
    ranges = decoder_ranges(
        model, exported, manifest, images=3, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 2), (2, 2)], "whole batches"
    assert set(ranges) == set(rounded_convs(model.spec.tokenizer))
    first, second = (np.concatenate([scale.ravel() for scale in tokens]) for tokens in batches)
    assert (first != second).any() and batches[0][0].shape == (2, 1)

    tokenizer, _ = build_modules(model)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(key: str) -> Any:
        def hook(module: Any, given: Any, made: torch.Tensor) -> None:
            seen.setdefault(key, []).extend((given[0].detach(), made.detach()))

        return hook

    for key, module in tokenizer.named_modules():
        if key in ranges:
            module.register_forward_hook(watch(key))
    with torch.no_grad():
        for tokens in batches:
            f_hat = tokenizer.accumulate([torch.from_numpy(scale) for scale in tokens])
            tokenizer.decode(f_hat)
    for key, found in ranges.items():
        for side, values in zip((found.input, found.output), (0, 1), strict=True):
            tensors = seen[key][values::2]
            low = min(float(t.min()) for t in tensors)
            high = max(float(t.max()) for t in tensors)
            assert side.low <= low + 1e-6 and side.high >= high - 1e-6, key
            # and are no wider than a step of a sixteenth of an octave
            assert side.low >= low * STEP - 1e-5 and side.high <= high * STEP + 1e-5, key


def test_ranges_are_the_same_twice_and_other_for_other_weights(
    exported: Path,
    manifest: Manifest,
    model: LoadedModel,
    small_model: Callable[..., LoadedModel],
) -> None:
    first, second = (decoder_ranges(model, exported, manifest, images=2) for _ in range(2))
    assert first == second
    other = dataclasses.replace(model, tokenizer=small_model(2).tokenizer)
    assert decoder_ranges(other, exported, manifest, images=2) != first


@pytest.mark.parametrize("value", [1.0, -1.0, 3.7e-5, -812.4, 2.0**0.5, 1e-30])
def test_an_end_is_widened_away_from_zero_to_a_step(value: float) -> None:
    found = watching._widen(value)
    assert math.copysign(1, found) == math.copysign(1, value)
    assert abs(value) <= abs(found) * (1 + 1e-12) and abs(found) < abs(value) * STEP * (1 + 1e-12)
    # the last digits of what was seen make no difference
    steps = math.log2(abs(found)) * watching.STEPS_AN_OCTAVE
    assert steps == pytest.approx(round(steps), abs=1e-6)


def test_zero_stays_zero() -> None:
    assert watching._widen(0.0) == 0.0


@pytest.mark.parametrize("preset", ["pocket", "var-d16", "infinity-2b", "infinity-8b"])
def test_the_named_convolutions_are_those_of_the_graph(preset: str) -> None:
    tokenizer = {**PRESETS, **TEXT_PRESETS}[preset].spec.tokenizer
    anything = ConvRanges(input=Range(low=-1, high=1), output=Range(low=-1, high=1))
    ranges = dict.fromkeys(rounded_convs(tokenizer), anything)
    form = GraphForm(precision="int8")
    if isinstance(tokenizer, BitTokenizerSpec):
        graph, plain = build_bit_decoder(tokenizer, form, ranges), set[str]()
    else:
        graph, plain = build_decoder(tokenizer, form, ranges), {"post_quant_conv"}
    nodes = graph.model(lambda name: (names.WEIGHTS, 0, 1)).graph.node
    made = {n.name.partition("/")[0] for n in nodes if n.op_type == "QLinearConv"}
    assert made == set(ranges)
    plain |= {"decoder.conv_in", "decoder.conv_out"}
    assert plain <= {n.name.partition("/")[0] for n in nodes if n.op_type == "Conv"}


def test_a_text_model_is_watched_with_and_without_a_prompt() -> None:
    """Features of "no prompt" for every other image, and drawn ones, which differ, between."""
    model = load_case(OWN / "seeded-small").model()
    t = model.spec.transformer
    rows = watching._prompts(model, range(4))
    for n in (0, 2):
        expected = model.transformer.read("cfg_uncond")[: t.text_length]
        np.testing.assert_array_equal(rows.features[n], expected)
        assert rows.lengths[n] == t.text_length
    assert len({row.tobytes() for row in rows.features}) == 3
    # an image does not depend on what is drawn beside it
    alone = watching._prompts(model, range(3, 4))
    np.testing.assert_array_equal(alone.features[0], rows.features[3])


@torch.inference_mode()
def test_convolutions_whose_rounding_harms_most_stay_in_fp32() -> None:
    model = load_case(OWN / "seeded-small").model()
    tokenizer = watching._tokenizer(model)
    assert isinstance(tokenizer, BitTokenizer)
    spec, rng = model.spec, torch.Generator().manual_seed(3)
    sizes = [(1, length, spec.tokenizer.token_bits) for length in spec.scale_lengths]
    bits = [torch.randint(0, 2, size, generator=rng) for size in sizes]
    f_hats = [tokenizer.accumulate(bits)]
    seen = {key: watching._Conv() for key in rounded_convs(spec.tokenizer)}
    hooks = [tokenizer.get_submodule(key).register_forward_hook(seen[key]) for key in seen]
    exact = [tokenizer.decode(f_hat) for f_hat in f_hats]
    for hook in hooks:
        hook.remove()
    ranges = {key: found.ranges() for key, found in seen.items()}

    def decibels(kept: Any) -> float:
        with decoder_noise._rounded(tokenizer, kept):
            found = [tokenizer.decode(f_hat) for f_hat in f_hats]
        pairs = zip(found, exact, strict=True)
        return min(-10 * math.log10(float(((a - b) / 2).square().mean())) for a, b in pairs)

    plain = decibels(ranges)
    assert 30 < plain < 45
    assert within_bound(tokenizer, f_hats, ranges, plain - 0.1) == ranges
    kept = within_bound(tokenizer, f_hats, ranges, plain + 3)
    assert decibels(kept) >= plain + 3
    assert len(ranges) / 2 < len(kept) < len(ranges), "few have most of the harm"
    assert kept.items() <= ranges.items()
    # the middle alone of larger images is tried, and the decoder is left as it was
    assert decoder_noise._middle(torch.zeros(1, 5, 40, 9)).shape == (1, 5, 16, 9)
    assert torch.equal(tokenizer.decode(f_hats[0]), exact[0])


def test_calibration_wants_an_image() -> None:
    with pytest.raises(UsageError, match="at least 1 image, found 0"):
        ExportOptions(precisions=("int8",), calibration=0)


def test_nothing_of_the_calibration_is_left(exported: Path) -> None:
    assert {p.name for p in exported.iterdir()} == {"int8", names.MANIFEST}
    listed = {path.name for path in (exported / "int8").iterdir()}
    graphs = ("condition", "step", "decoder", "encoder", "accumulate")
    assert listed == {names.WEIGHTS, *(f"{n}.onnx" for n in graphs)}
    for path in exported.rglob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
