"""fp16 measured on the CPU: agreement with fp32, magnitudes, and the warning of `export`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from planted_weights import Changed
from safetensors.torch import save_file

from cli_steps import run
from tools.fp16_study import main, study
from var_deploy import names
from var_deploy.errors import BundleError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules
from var_deploy.export.debug.fp16_overflow import HALF_MAX, calibrate
from var_deploy.export.debug.interpreter import TorchGraph
from var_deploy.export.debug.interpreter_backend import generate
from var_deploy.manifest import read_manifest

Model = Callable[..., LoadedModel]
BOTH: Any = ("fp32", "fp16")
BIAS = "blocks.1.ffn.fc1.bias"


def with_bias(model: LoadedModel, value: float) -> LoadedModel:
    """The first bias of a feed-forward part gets one large entry."""

    def change(bias: Any) -> Any:
        bias = bias.copy()
        bias[3] = value
        return bias

    return dataclasses.replace(model, transformer=Changed(model.transformer, BIAS, change))


@pytest.fixture(scope="module")
def model(small_model: Model) -> LoadedModel:
    return small_model()


@pytest.fixture(scope="module")
def bundle(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "bundle"
    export_bundle(model, out, ExportOptions(precisions=BOTH, batch=2))
    return out


@pytest.fixture(scope="module")
def near(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a value of 20000 inside."""
    out = tmp_path_factory.mktemp("near") / "bundle"
    export_bundle(with_bias(model, 20000.0), out, ExportOptions(precisions=BOTH, layout="shared"))
    return out


@pytest.fixture(scope="module")
def over(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in which fp16 overflows: the sum of a product leaves its range."""
    out = tmp_path_factory.mktemp("over") / "bundle"
    changed = Changed(model.transformer, "blocks.0.attn.proj.weight", lambda w: np.sign(w) * 6e4)
    loaded = dataclasses.replace(model, transformer=changed)
    export_bundle(loaded, out, ExportOptions(precisions=BOTH, layout="per-scale"))
    return out


# --- the study


def test_the_study_counts_tokens_images_and_layers(bundle: Path) -> None:
    told: list[float] = []
    result = study(bundle, images=3, progress=lambda message, fraction: told.append(fraction))
    spec = read_manifest(bundle).model
    assert result.digest == read_manifest(bundle).digest()
    assert [s.tokens for s in result.scales] == [4 * n for n in spec.scale_lengths]
    assert result.images == len(result.psnr_forced) == len(result.psnr_free) == 4
    for scale in result.scales:
        assert 0.8 * scale.tokens <= scale.forced <= scale.tokens
        assert 0 <= scale.free <= scale.tokens
    # from the same tokens, only rounding is left in the image; and there is rounding
    assert all(40 < psnr < 150 for psnr in result.psnr_forced)
    assert not result.overflow
    largest = [layer.largest for layer in result.layers]
    assert largest == sorted(largest, reverse=True) and 0 < largest[0] < HALF_MAX / 8
    layers = {layer.layer for layer in result.layers}
    assert {"blocks.1.ffn", "blocks.0.attn", "decoder.conv_in", "encoder.conv_in"} <= layers
    assert any(layer.startswith("blocks.0.ada_lin") for layer in layers)
    assert not layers & {"head", "sampler", "quantize", "next_input"}, "these are fp32"
    assert told == sorted(told) and told[-1] < 1
    again = study(bundle, images=3)
    assert again == result


def test_a_provider_of_onnxruntime_takes_the_place_of_the_interpreter(bundle: Path) -> None:
    """On a CPU it computes fp16 products in fp32, so magnitudes are near, and agreement is high."""
    found, expected = (
        study(bundle, images=3, provider="CPUExecutionProvider"),
        study(bundle, images=3),
    )
    assert found.digest == expected.digest and found.images == expected.images
    assert [s.tokens for s in found.scales] == [s.tokens for s in expected.scales]
    for scale in found.scales:
        assert 0.8 * scale.tokens <= scale.forced <= scale.tokens
    assert all(40 < psnr < 200 for psnr in found.psnr_forced)
    largest = {r.layer: r.largest for r in found.layers}
    interpreted = {r.layer: r.largest for r in expected.layers if r.graph != "encoder"}
    assert largest.keys() == interpreted.keys()
    for layer, value in largest.items():
        assert value == pytest.approx(interpreted[layer], rel=0.02), layer


def test_a_provider_finds_where_values_are_large_or_overflow(near: Path, over: Path) -> None:
    first = study(near, provider="CPUExecutionProvider").layers[0]
    assert first.layer == "blocks.1.ffn" and 19_000 < first.largest < 40_000
    result = study(over, provider="CPUExecutionProvider")
    assert result.overflow.startswith("scale_00: blocks.0.attn/MatMul_")


def test_a_provider_that_is_not_there_is_told(bundle: Path) -> None:
    found = CliRunner().invoke(main, [str(bundle), "--provider", "NoSuchProvider"])
    assert found.exit_code == 1 and "has no NoSuchProvider" in found.stderr


def test_free_tokens_are_those_of_a_generation(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    full, half = (generate(bundle, manifest, p, [0, 2], seed=9) for p in BOTH)
    forced = generate(bundle, manifest, "fp16", [0, 2], seed=9, forced=full.tokens)
    unlike = [t + 1 for t in full.tokens]
    other = generate(bundle, manifest, "fp16", [0, 2], seed=9, forced=[t % 48 for t in unlike])
    # the drawn tokens come back, not the forced ones
    np.testing.assert_array_equal(other.tokens[0], half.tokens[0])
    np.testing.assert_array_equal(forced.tokens[0], half.tokens[0])
    error = np.abs(forced.image - full.image).max()
    assert 0 < error < 3e-2
    assert np.abs(other.image - full.image).max() > 10 * error


def test_the_largest_magnitude_is_found_where_it_is(near: Path) -> None:
    first = study(near).layers[0]
    assert first.layer == "blocks.1.ffn" and first.graph.startswith(f"{names.STEP} @ ")
    assert 19_000 < first.largest < 40_000


def test_an_overflow_ends_the_study_and_is_named(over: Path) -> None:
    result = study(over)
    assert result.overflow.startswith("scale_00: blocks.0.attn/MatMul_")
    assert math.isinf(result.layers[0].largest) and result.layers[0].layer == "blocks.0.attn"
    assert result.images == 0 and not result.psnr_free
    assert "Ended by an overflow: scale_00: blocks.0.attn/MatMul_" in result.markdown()
    json.dumps(result.to_json(), allow_nan=False)


def test_the_command_prints_tables_and_writes_json(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    result = CliRunner().invoke(main, [str(bundle), "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert not result.stderr
    data = json.loads(out.read_text())
    assert data["images"] == 2 and len(data["scales"]) == 3
    lines = result.stdout.splitlines()
    heads = [i + 1 for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(heads) == 3
    assert f"| 2 | {data['scales'][2]['tokens']} | " in result.stdout
    assert data["layers"][0]["layer"] in lines[heads[2]]
    for line in lines:
        assert not line or line.startswith("|") or "more layers stay at or below" in line


def test_the_command_refuses_in_a_line(model: LoadedModel, tmp_path: Path, bundle: Path) -> None:
    export_bundle(model, tmp_path / "half", ExportOptions(precisions=("fp16",), layout="shared"))
    with pytest.raises(BundleError, match="--precision fp32"):
        study(tmp_path / "half")
    for arguments in ([tmp_path / "half"], [bundle, "--json", bundle / "manifest.json" / "x.json"]):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


# --- the warning


def test_calibration_is_silent_where_all_is_far_from_overflow(bundle: Path) -> None:
    told: list[tuple[str, float]] = []
    assert calibrate(bundle, 3, lambda message, part: told.append((message, part))) == ""
    fractions = [part for _, part in told]
    assert fractions == sorted(fractions) and fractions[-1] < 1
    assert told[0][0] == "looking for overflow: fp16/scale_00"


def test_calibration_names_the_layer_that_comes_close(near: Path) -> None:
    warning = calibrate(near, 1)
    graph, _, rest = warning.partition(": ")
    assert graph.startswith(f"fp16/{names.STEP} @ ")
    assert rest.startswith("blocks.1.ffn/") and "fp16 ends at 65504" in rest
    assert "\n" not in warning


def test_calibration_names_the_first_layer_that_overflows(over: Path) -> None:
    warning = calibrate(over, 1)
    assert warning.startswith("fp16/scale_00: blocks.0.attn/MatMul_")
    assert warning.endswith("overflows fp16, which ends at 65504; export with --precision fp32")


def test_calibration_sees_the_encoder(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = TorchGraph.run

    def watch(self: TorchGraph, *inputs: Any, **options: Any) -> Any:
        assert options["on_value"] is not None
        seen.append(self.name)
        return real(self, *inputs, **options)

    monkeypatch.setattr(TorchGraph, "run", watch)
    calibrate(bundle, 1)
    scales = [names.scale_graph(k) for k in range(3)]
    assert seen == [names.CONDITION, *scales, names.DECODER, names.ENCODER]


def test_export_warns_in_one_line(model: LoadedModel, tmp_path: Path) -> None:
    files: list[object] = []
    modules = build_modules(with_bias(model, 20000.0))
    for option, module in zip(("tokenizer", "checkpoint"), modules, strict=True):
        state = {key: value.clone().contiguous() for key, value in module.state_dict().items()}
        save_file(state, tmp_path / f"{option}.safetensors")
        files += [f"--{option}", tmp_path / f"{option}.safetensors"]
    half = ("export", *files, "--precision", "fp16", "--layout", "shared")
    loud = run(*half, "--out", tmp_path / "loud")
    assert loud.exit_code == 0, loud.output
    assert loud.stderr.startswith("warning: fp16/step @ ") and loud.stderr.count("\n") == 1
    assert "blocks.1.ffn/" in loud.stderr and loud.stdout.startswith("wrote ")
    quiet = run(*half, "--out", tmp_path / "quiet", "--calibration", 0)
    assert quiet.exit_code == 0 and not quiet.stderr
    # what is written does not depend on it
    assert read_manifest(tmp_path / "loud") == read_manifest(tmp_path / "quiet")
    assert run(*half, "--out", tmp_path / "no", "--calibration", -1).exit_code == 2
