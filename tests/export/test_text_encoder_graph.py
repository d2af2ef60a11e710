"""The graph `text_encoder` in every precision, against the published T5's outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import t5_case
from var_deploy import names
from var_deploy.bundle.onnx_file import inspect_onnx
from var_deploy.config import GraphForm
from var_deploy.export.checkpoint.text_encoder import (
    TEXT_ENCODERS,
    LoadedTextEncoder,
    build_t5,
    open_text_encoder,
)
from var_deploy.export.debug.interpreter import TorchGraph
from var_deploy.export.graphs.text_encoder import build_text_encoder
from var_deploy.export.lint.int8 import lint_int8
from var_deploy.export.lint.tensorrt import lint
from var_deploy.export.text_encoder_bundle import export_text_encoder
from var_deploy.text.manifest import text_encoder_inputs, text_encoder_outputs

PRECISIONS: tuple[Any, ...] = ("fp32", "fp16", "int8")
# largest difference; the features reach 5
BOUND = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.25}
# norm of the difference over the norm, as `verify` bounds fp16 and int8 (found: 3e-4, 0.019)
NORM_BOUND = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.06}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedTextEncoder:
    folder = t5_case.hub_folder(tmp_path_factory.mktemp("t5") / "hub")
    return open_text_encoder(folder, t5_case.SPEC.length)


@pytest.fixture(scope="module")
def folder(model: LoadedTextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / "encoder"
    export_text_encoder(model, out, PRECISIONS)
    return out


def graph_file(folder: Path, precision: str) -> Path:
    return folder / precision / names.graph_file(names.TEXT_ENCODER)


def run(path: Path, ids: Any, mask: Any) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {names.TEXT_IDS: ids, names.TEXT_MASK: mask.astype(bool)}
    return session.run([names.TEXT_FEATURES], given)[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_published_features(folder: Path, precision: str) -> None:
    golden, path = t5_case.arrays(), graph_file(folder, precision)
    for row, length in enumerate(t5_case.LENGTHS):
        one = slice(row, row + 1)
        features = run(path, golden["input_ids"][one], golden["attention_mask"][one])[0]
        expected = golden["last_hidden_state"][row]
        assert np.abs(features - expected).max() <= BOUND[precision]
        apart = np.linalg.norm(features - expected) / np.linalg.norm(expected)
        assert apart <= NORM_BOUND[precision]
        assert not features[length:].any(), "zero beyond the prompt"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ids_of_the_padding_do_not_matter(folder: Path, precision: str) -> None:
    """Not in int8 either, where one scale serves all rows of a product."""
    golden, path = t5_case.arrays(), graph_file(folder, precision)
    ids, mask = golden["input_ids"][1:2], golden["attention_mask"][1:2]
    other = np.where(mask == 1, ids, 77)
    np.testing.assert_array_equal(run(path, ids, mask), run(path, other, mask))


@pytest.mark.parametrize("length", [1, 7, 33])
def test_any_length(length: int, tmp_path: Path) -> None:
    """A graph of another length gives the same features."""
    model = t5_case.random_model(length)
    export_text_encoder(model, tmp_path / "out")
    ids = np.arange(3, 3 + length)[None]
    valid = max(1, length - 2)
    mask = np.arange(length)[None] < valid
    features = run(graph_file(tmp_path / "out", "fp32"), ids, mask)
    expected = build_t5(model)(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_takes_the_graph(precision: Any) -> None:
    for spec in (t5_case.SPEC, dataclasses.replace(TEXT_ENCODERS["flan-t5-xl"], depth=3)):
        graph = build_text_encoder(spec, GraphForm(precision=precision))
        assert not lint(graph.model(lambda name: (names.WEIGHTS, 0, 1)), precision)


def test_int8_is_as_documented(folder: Path) -> None:
    assert not lint_int8(graph_file(folder, "int8"), set())
    model = onnx.load(str(graph_file(folder, "int8")), load_external_data=False)
    full = [t.name for t in model.graph.initializer if t.name.endswith(".wo.weight")]
    rounded = [n for n in model.graph.node if n.op_type == "MatMulInteger"]
    assert len(full) == t5_case.SPEC.depth and len(rounded) == 6 * t5_case.SPEC.depth


def test_what_is_fp32_in_fp16(folder: Path) -> None:
    """wo, the gated product before it, the norms, and what they are added to."""
    model = onnx.load(str(graph_file(folder, "fp16")), load_external_data=False)
    half = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    matrices = {t.name for t in model.graph.initializer if t.name.endswith("weight")}
    full = {name for name in matrices - half}
    assert all(name.endswith(("norm.weight", "wo.weight", "bias.weight")) for name in full)
    assert sum(name.endswith("wo.weight") for name in full) == t5_case.SPEC.depth


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_passes_the_check_before_it_is_run(folder: Path, precision: str) -> None:
    path = graph_file(folder, precision)
    weights = path.with_name(names.WEIGHTS).stat().st_size
    found = inspect_onnx(path.read_bytes(), weights)
    assert list(found.inputs) == text_encoder_inputs(t5_case.SPEC)
    assert list(found.outputs) == text_encoder_outputs(t5_case.SPEC)
    assert len(path.read_bytes()) < 60_000, "the table of biases is not in the graph"


def test_the_interpreter_computes_it(folder: Path) -> None:
    golden = t5_case.arrays()
    given = {
        names.TEXT_IDS: golden["input_ids"][2:3],
        names.TEXT_MASK: golden["attention_mask"][2:3].astype(bool),
    }
    found = TorchGraph(graph_file(folder, "fp32")).run(given)[names.TEXT_FEATURES]
    np.testing.assert_allclose(found[0], golden["last_hidden_state"][2], atol=1e-4, rtol=0)


def test_weights_are_stored_once(folder: Path) -> None:
    """At most 3 % beyond the parameters, the bucket table of one length included."""
    spec = TEXT_ENCODERS["flan-t5-xl"]
    graph = build_text_encoder(spec, GraphForm(precision="fp32"))
    stored = sum(weight.nbytes for weight in graph.weights.values())
    assert stored <= 1.001 * 4 * 1_223_527_424
    half = build_text_encoder(spec, GraphForm(precision="fp16"))
    wo = 24 * 5120 * 2048
    expected = 2 * (1_223_527_424 + wo)
    assert sum(weight.nbytes for weight in half.weights.values()) <= 1.001 * expected


def test_the_same_bytes(model: LoadedTextEncoder, folder: Path, tmp_path: Path) -> None:
    export_text_encoder(model, tmp_path / "again", PRECISIONS)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 8
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_tensorrt_for_rtx_builds_it(folder: Path) -> None:
    pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed (it exists for x86-64 alone)"
    )
    from var_deploy.runtime.tensorrt.library import load_library
    from var_deploy.runtime.tensorrt.network import build_engine
    from var_deploy.runtime.tensorrt.target import BuildOptions

    options = BuildOptions(compute_capability=89, optimization_level=0)
    library = load_library("tensorrt_rtx")
    plan = bytes(build_engine(library, graph_file(folder, "fp16"), [], options).plan)
    assert len(plan) > 100_000
