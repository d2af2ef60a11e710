"""The graphs that measure a machine: as shipped, computing what they say, and nothing besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from var_deploy.bench.rates import CHANNELS, SIDE, K, N
from var_deploy.export.graphs.probes import FOLDER, PROBES, probe_bytes


def run(name: str, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(probe_bytes(name), options)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("name", PROBES)
def test_the_files_are_what_the_program_writes(name: str) -> None:
    assert (FOLDER / f"{name}.onnx").read_bytes() == probe_bytes(name)
    assert len(probe_bytes(name)) < 4096
    onnx.checker.check_model(onnx.load_from_string(probe_bytes(name)), full_check=True)


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.onnx")} == set(PROBES)


def test_both_products_are_that_product() -> None:
    x = np.random.default_rng(0).standard_normal((3, K), np.float32)
    numbers = np.arange(K * N, dtype=np.float64).reshape(K, N)
    expected = x @ np.sin(numbers)
    assert np.abs(run("gemm_fp32", x) - expected).max() < 0.05
    error = np.abs(run("gemm_int8", x) - expected).max() / np.abs(expected).max()
    assert error < 0.05


def test_both_convolutions_are_that_convolution() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (1, CHANNELS, SIDE, SIDE), np.uint8)
    exact = run("conv_fp32", (codes.astype(np.float32) - 128) / 40)
    rounded = run("conv_int8", codes).astype(np.float32) - 128
    inside = np.abs(exact) < 120  # uint8 holds no more
    assert inside.mean() > 0.9
    assert np.abs(exact - rounded)[inside].max() < 3


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("gemm_fp32", {"MatMul"}),
        ("gemm_int8", {"DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul"}),
        ("conv_fp32", {"Conv"}),
        ("conv_int8", {"QLinearConv"}),
    ],
)
def test_weights_are_there_before_the_first_run(
    name: str, operators: set[str], tmp_path: Path
) -> None:
    """A runtime has folded what makes them: nothing is left but the work itself."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(probe_bytes(name), options)
    nodes = onnx.load(tmp_path / "folded.onnx").graph.node
    assert {node.op_type for node in nodes} <= operators | {"MatMulIntegerToFloat"}
