"""`verify` of text-to-image bundles, and its `--bisect`: they pass what is right, and name what is
not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from golden_infinity import OWN, Case, load_case
from planted_weights import plant

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.text_model import LoadedTextModel
from var_deploy.export.debug import bisect as bisecting
from var_deploy.export.debug.bisect import bisect, bisect_bundle, parse_sides
from var_deploy.export.debug.bisect_backends import RUNNERS, run_pytorch
from var_deploy.export.verify.bundle import verify_model
from var_deploy.export.verify.int8 import DECODER_PSNR
from var_deploy.export.verify.reference import Reference
from var_deploy.export.verify.requests import inputs_of, reference_of
from var_deploy.export.verify.text_reference import text_inputs
from var_deploy.manifest import read_manifest


@pytest.fixture(scope="module")
def case() -> Case:
    return load_case(OWN / "seeded-small")


@pytest.fixture(scope="module")
def model(case: Case) -> LoadedTextModel:
    return case.model()


@pytest.fixture(scope="module")
def bundle(model: LoadedTextModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "bundle"
    options = ExportOptions(precisions=("fp32", "fp16", "int8"), batch=2, guidance=None)
    export_bundle(model, out, options)
    return out


def test_every_graph_and_both_loops_agree(bundle: Path, model: LoadedTextModel) -> None:
    report = verify_model(bundle, model, images=3)
    assert report.passed, report.table()
    graphs = {check.graph for check in report.checks if check.precision == "fp32"}
    assert {names.CONDITION, names.UNCONDITIONAL, names.DECODER, "loop per-scale"} <= graphs
    assert f"{names.STEP} @ 3" in graphs
    (drawn,) = (check for check in report.checks if check.graph == f"{names.DECODER} drawn")
    assert drawn.precision == "int8" and drawn.psnr is not None
    assert DECODER_PSNR < drawn.psnr < 80, "its convolutions are rounded"
    total = 4 * model.spec.draws  # 3 images are rounded up to two batches of 2
    assert f"{total} of {total} tokens of 4 images" in report.verdict()[0]
    stored = read_manifest(bundle)
    assert stored.parity_is_current()
    assert stored.parity is not None
    assert stored.parity["labels"] == []


def test_other_weights_fail_by_name(bundle: Path, model: LoadedTextModel, case: Case) -> None:
    key = "blocks.1.ca.proj.weight"
    arrays = {**case.transformer.arrays, key: case.transformer.arrays[key] * 1.05}
    wrong = dataclasses.replace(
        model, transformer=dataclasses.replace(case.transformer, arrays=arrays)
    )
    report = verify_model(bundle, wrong, precision="fp32", images=1)
    assert not report.passed
    # the block's keys and values are made before it: only what follows differs
    assert "fp32/scale_00: logits" in str(report.failure)


def test_prompts_have_different_lengths_and_belong_to_their_seed(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    first, second = (text_inputs(manifest, 0, n).conditions for n in (0, 2))
    assert len({*first.lengths, *second.lengths}) > 1
    assert not np.array_equal(first.features, second.features)
    np.testing.assert_array_equal(first.features, text_inputs(manifest, 0, 0).conditions.features)


def test_labels_are_refused(bundle: Path, model: LoadedTextModel) -> None:
    with pytest.raises(UsageError, match="takes prompts, not labels"):
        verify_model(bundle, model, labels="star")


# --- the first layer that differs


@pytest.fixture(scope="module")
def reference(bundle: Path, model: LoadedTextModel) -> Reference:
    manifest = read_manifest(bundle)
    return reference_of(model, manifest, 0, inputs_of(manifest, 0, 0))


def test_bisect_names_the_layer_of_a_wrong_weight(
    bundle: Path, reference: Reference, tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(bundle, tmp_path / "wrong"))
    weight = "blocks.1.ca.mat_q.bias"
    plant(wrong, names.scale_graph(1), "fp16", weight, "blocks.0.ca.mat_q.bias")
    manifest = read_manifest(wrong)
    result = bisect(wrong, manifest, reference, parse_sides("onnxruntime,pytorch:fp16", manifest))
    found = result.divergence
    assert found is not None
    assert result.graphs[-1] == found.graph == names.scale_graph(1)
    assert result.graphs[:2] == (names.CONDITION, names.UNCONDITIONAL)
    proto = onnx.load(str(wrong / "fp16" / "scale_01.onnx"), load_external_data=False)
    node = next(node for node in proto.graph.node if weight in node.input)
    assert (found.node, found.operator, found.value) == (node.name, "Add", node.output[0])
    assert dict(found.inputs)[weight] is None


def test_bisect_compares_bits_by_their_margins_and_not_what_follows_from_them(
    bundle: Path, reference: Reference
) -> None:
    manifest = read_manifest(bundle)
    sides = parse_sides("onnxruntime,pytorch", manifest)
    proto = onnx.load(str(bundle / "fp32" / "scale_01.onnx"), load_external_data=False)
    drawn = next(n for n in proto.graph.node if names.TOKENS in n.output).input[2]

    def flipped(path: Path, inputs: Any, wanted: Any) -> Any:
        """Other bits than those drawn at scale 1."""
        values = dict(run_pytorch(path, inputs, wanted))
        if path.stem == names.ENCODER:  # what follows from its bits follows from rounding
            assert not [name for name in values if name.startswith("scale_")]
            return values
        if drawn in values:
            values[drawn] = 1 - values[drawn]
        return values

    runners = {**RUNNERS, "pytorch": flipped}
    result = bisect(
        bundle, manifest, reference, sides, graph=names.scale_graph(1), runners=runners
    )
    assert result.divergence is not None and result.divergence.value == drawn
    graph = names.ENCODER
    result = bisect(bundle, manifest, reference, sides, graph=graph, runners=runners)
    assert result.divergence is None, result.text()


def test_bisect_loads_the_model_of_a_text_bundle(
    bundle: Path,
    model: LoadedTextModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scales of this one are of no published list, so that its files cannot be opened."""
    sides = "onnxruntime,pytorch"
    with pytest.raises(UsageError, match="of no published list"):
        bisect_bundle(bundle, sides, graph=names.UNCONDITIONAL)
    monkeypatch.setattr(bisecting, "load_bundle_model", lambda *_: model)
    result = bisect_bundle(bundle, sides, graph=names.UNCONDITIONAL)
    assert result.divergence is None and result.graphs == (names.UNCONDITIONAL,)
