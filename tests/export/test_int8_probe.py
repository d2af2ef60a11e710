"""The probe of int8 kernels: its file, fusions, known results, and what a wrong one does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from fake_machine import workstation
from var_deploy.errors import BackendError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel
from var_deploy.export.int8.probe import probe_bytes
from var_deploy.host.doctor import examine
from var_deploy.host.machine import Answer
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends import int8_check
from var_deploy.runtime.backends.int8_check import (
    CONVOLUTIONS,
    GRAPH,
    PRODUCTS,
    conv_divisors,
    expected,
    inputs,
    int8_problem,
    weights,
)
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend

Model = Callable[..., LoadedModel]


def test_the_file_is_what_the_program_writes() -> None:
    assert GRAPH.read_bytes() == probe_bytes()
    assert len(probe_bytes()) < 16_384
    onnx.checker.check_model(onnx.load_from_string(probe_bytes()), full_check=True)


def test_operators_are_fused_as_in_a_bundle(small_model: Model, tmp_path: Path) -> None:
    """What ONNX Runtime makes of the graphs of a bundle, it makes of the probe."""
    options = ExportOptions(precisions=("int8",), layout="shared", calibration=1)
    export_bundle(small_model(), tmp_path / "bundle", options)

    def fused(path: Path) -> Counter[str]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "fused.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph.node
        return Counter(node.op_type for node in nodes)

    probe, rounding = fused(GRAPH), ("Quant", "Integer", "QLinear")
    for graph in ("step", "condition", "decoder"):
        kinds = fused(tmp_path / "bundle/int8" / f"{graph}.onnx")
        used = {kind for kind in kinds if any(word in kind for word in rounding)}
        assert used - {"QuantizeLinear", "DequantizeLinear"} <= set(probe), graph
    assert probe["QLinearConv"] == len(CONVOLUTIONS)
    assert "MatMulInteger" not in probe, "every product is fused"


def test_results_are_known_to_the_last_bit() -> None:
    """Sums are exact in fp32, no quotient is near one half, and no pair of products overflows."""
    given = inputs(9)
    for name, inner, columns, _, _ in PRODUCTS:
        x = given[f"x.{name}"] * 16
        assert (x == np.rint(x)).all() and (x.min(), x.max()) == (-100, 155)
        for width in columns:
            matrix = weights(inner * width).reshape(inner, width)
            assert (np.abs(x.reshape(-1, inner)) @ np.abs(matrix)).max() < 2**24
            assert 255 * 2 * np.abs(matrix).max() < 2**15
            assert len(np.unique(matrix)) > 60, "numbers vary"
    found = expected(given)
    for name, _, outputs, _, _ in CONVOLUTIONS:
        assert (conv_divisors(outputs) % 2 == 1).all()
        values = found[f"y.{name}"]
        assert len(np.unique(values)) > 100 and ((values > 0) & (values < 255)).mean() > 0


def test_this_machine_computes_them(fresh: None) -> None:
    for threads in (1, 2):
        int8_check._found = None
        assert int8_problem(OrtCpuBackend(threads)) == ""


@pytest.fixture
def fresh() -> Iterator[None]:
    """As in a process that has not asked yet."""
    before, int8_check._found = int8_check._found, None
    yield
    int8_check._found = before


@pytest.mark.parametrize("name", ["y.product.0", "y.products.1", "y.convolution 2x2"])
def test_one_wrong_value_is_enough(fresh: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A kernel that is wrong stands in: what is expected is moved instead."""

    def moved(given: dict[str, Any]) -> dict[str, Any]:
        found = expected(given)
        found[name].flat[-1] += 1
        return found

    monkeypatch.setattr(int8_check, "expected", moved)
    problem = int8_problem(OrtCpuBackend(1))
    assert problem.startswith(f"onnxruntime {onnxruntime.__version__} computes int8 wrongly on ")
    assert f"{name[2:]} of " in problem and "1 of " in problem and "\n" not in problem


WRONG = "onnxruntime 1.31 computes int8 wrongly on this processor (Cortex-X9): product is off"


@pytest.fixture
def broken(fresh: None) -> None:
    """A machine with wrong kernels."""
    int8_check._found = WRONG


@pytest.fixture(scope="module")
def bundle(small_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "bundle"
    every: Any = {"precisions": ("fp32", "int8"), "layout": "shared", "calibration": 1}
    export_bundle(small_model(), out, ExportOptions(**every))
    return out


def test_a_machine_that_fails_is_refused_int8(bundle: Path, broken: None) -> None:
    with pytest.raises(BackendError) as caught:
        Pipeline.load(bundle, precision="int8", threads=1)
    said = "take another --precision, or another version of onnxruntime"
    assert str(caught.value) == f"{WRONG}; {said}"
    with Pipeline.load(bundle, threads=1) as pipe:
        how = pipe.describe()
        assert (how.precision, how.reason) == ("fp32", WRONG)
        pipe.generate([0])


def test_with_nothing_but_int8_it_is_refused_too(
    small_model: Model, tmp_path: Path, fresh: None
) -> None:
    options = ExportOptions(precisions=("int8",), layout="shared", calibration=1)
    export_bundle(small_model(), tmp_path / "bundle", options)
    int8_check._found = WRONG
    with pytest.raises(BackendError, match=r"Cortex-X9.*take another --precision"):
        Pipeline.load(tmp_path / "bundle", threads=1)
    with pytest.raises(BackendError, match="Cortex-X9"):  # its ranges would be those of noise
        export_bundle(small_model(), tmp_path / "other", options)
    assert not (tmp_path / "other").exists()


def test_int8_is_taken_where_it_is_right(bundle: Path, fresh: None) -> None:
    with Pipeline.load(bundle, threads=1) as pipe:
        how = pipe.describe()
    assert how.precision == "int8"
    assert how.reason == "the bundle was exported with int8"
    assert int8_check._found == "", "it was asked for"


def test_doctor_shows_it() -> None:
    machine = workstation()
    (row,) = (f for f in examine(machine).findings if f.name == "int8")
    assert (row.state, row.found) == ("ok", "computed correctly")
    for answer in (Answer(output=f"{WRONG}\n"), Answer(problem="no answer within 20 seconds")):
        machine.int8_answer = answer
        report = examine(machine)
        (row,) = (f for f in report.findings if f.name == "int8")
        assert row.state == "problem" and row.found == (answer.problem or WRONG)
        assert "--precision fp32" in row.remedy
        assert report.generates, "fp32 works all the same"
    machine.modules = {}
    assert not [f for f in examine(machine).findings if f.name == "int8"]
