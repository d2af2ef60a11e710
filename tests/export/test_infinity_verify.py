"""`verify` of text-to-image bundles: it passes what is right, and names what is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from golden_infinity import OWN, Case, load_case

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.text_model import LoadedTextModel
from var_deploy.export.verify.bundle import verify_model
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
