"""fp16 of text-to-image models and their text encoders, measured on the CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from planted_weights import Changed
from text_case import text_model

import t5_case
from tools.fp16_study import study
from tools.fp16_text_study import PROMPTS, main, study_text_encoder
from var_deploy import names
from var_deploy.errors import BundleError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.debug.fp16_overflow import HALF_MAX, calibrate
from var_deploy.export.text_encoder_bundle import export_text_encoder

BOTH: Any = ("fp32", "fp16")
WO = "encoder.block.1.layer.1.DenseReluDense.wo.weight"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "bundle"
    options = ExportOptions(precisions=BOTH, batch=2, guidance=None, layout="shared")
    export_bundle(text_model(16), out, options)
    return out


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose last `wo` gives values that fp16 does not hold, as those of released ones do."""
    model = t5_case.random_model()
    large = Changed(model.weights, WO, lambda weight: weight * 1e6)
    out = tmp_path_factory.mktemp("half-text") / "t5"
    export_text_encoder(dataclasses.replace(model, weights=large), out, BOTH)
    return out


def test_the_study_counts_bits_and_names_layers(bundle: Path) -> None:
    result = study(bundle)
    spec = text_model(16).spec
    bits = [2 * length * spec.tokenizer.token_bits for length in spec.scale_lengths]
    assert [scale.tokens for scale in result.scales] == bits
    assert result.images == 2 and not result.overflow
    for scale in result.scales:
        assert 0.9 * scale.tokens <= scale.forced <= scale.tokens
    assert all(40 < psnr < 150 for psnr in result.psnr_forced)
    layers = {layer.layer for layer in result.layers}
    assert {"blocks.1.ffn", "blocks.0.sa", "blocks.0.ca", "decoder.conv_in"} <= layers
    assert not layers & {"head", "sampler"}, "these are fp32"
    graphs = {layer.graph for layer in result.layers}
    assert {names.CONDITION, names.ENCODER} <= graphs
    assert result.layers[0].largest < HALF_MAX / 8
    assert calibrate(bundle, 1) == ""


def test_a_layer_near_overflow_is_named(tmp_path: Path) -> None:
    def change(bias: Any) -> Any:
        bias = bias.copy()
        bias[3] = 20000.0
        return bias

    model = text_model(16)
    near = Changed(model.transformer, "blocks.1.ffn.fc1.bias", change)
    options = ExportOptions(precisions=("fp16",), guidance=None, layout="shared")
    export_bundle(dataclasses.replace(model, transformer=near), tmp_path / "near", options)
    warning = calibrate(tmp_path / "near", 1)
    assert warning.startswith(f"fp16/{names.STEP} @ ") and ": blocks.1.ffn/" in warning
    assert "fp16 ends at 65504" in warning and "\n" not in warning


def test_what_a_text_encoder_keeps_in_fp32_is_measured(encoder: Path) -> None:
    result = study_text_encoder(encoder)
    assert len(result.errors) == len(result.lengths) == len(PROMPTS)
    assert result.lengths[0] == 1 and max(result.lengths) > 8
    assert max(result.errors) < 3e-2 and not result.overflow
    # the last norm squares what the last `wo` gives
    assert {layer.layer for layer in result.beyond} == {"text_wo.1", "text_norm"}
    # what is added to the scores of padding is not a value of the model
    scores = next(layer for layer in result.full if layer.layer == "text_blocks.0.attention")
    assert scores.largest < 1000
    half = {layer.layer for layer in result.half}
    assert "text_blocks.1.ffn" in half and "text_wo.1" not in half
    assert result.half[0].largest < HALF_MAX


def test_the_command(encoder: Path, bundle: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "study.json"
    prompts.write_text("a fox\nth\u00e9\n", encoding="utf-8")
    result = CliRunner().invoke(main, [str(encoder), "--prompts", str(prompts), "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "Would overflow in fp16, and are kept in fp32: text_norm, text_wo.1." in result.output
    assert "| text_wo.1 | " in result.output
    data = json.loads(out.read_text())
    assert len(data["errors"]) == 2 and data["overflow"] == ""
    prompts.write_bytes(b"\xff\xfe")
    for arguments in ([encoder, "--prompts", prompts], [bundle]):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_an_overflow_ends_the_study(tmp_path: Path) -> None:
    model = t5_case.random_model()
    key = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
    wide = Changed(model.weights, key, lambda weight: np.full_like(weight, 3e4))
    export_text_encoder(dataclasses.replace(model, weights=wide), tmp_path / "t5", BOTH)
    result = study_text_encoder(tmp_path / "t5", ["a fox"])
    assert result.overflow.startswith("text_blocks.0.ffn/") and not result.errors
    assert "Ended by an overflow: text_blocks.0.ffn/" in result.markdown()
    json.dumps(result.to_json(), allow_nan=False)
    with pytest.raises(BundleError, match=r"var-deploy export|not a bundle"):
        study_text_encoder(tmp_path)
