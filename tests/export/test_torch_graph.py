"""The interpreter: fp32 graphs as ONNX Runtime computes them, fp16 as the number format demands."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from var_deploy import names
from var_deploy.errors import ExportError
from var_deploy.export.debug.interpreter import OPERATORS, TorchGraph
from var_deploy.export.debug.interpreter_backend import generate
from var_deploy.export.graphs.builder import IR_VERSION, OPSET
from var_deploy.manifest import read_manifest
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import uniforms

RANDOM = np.random.RandomState(0)


def draw(*shape: int) -> NDArray[np.float32]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def flags(*shape: int) -> NDArray[np.bool_]:
    return RANDOM.rand(*shape) > 0.5


X, Y, ROW = draw(2, 3, 4), draw(2, 3, 4), draw(4)
ROWS = np.round(draw(3, 4))  # with equal numbers among them
BOOLS = (flags(2, 3, 4), flags(4))
REDUCE = ((X, ints(-1)), {"keepdims": 0})

# operator → inputs, attributes; several cases where an operator is used in several ways
CASES: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "Add": [((X, ROW), {}), ((ints(3), ints(4)), {})],
    "And": [(BOOLS, {})],
    "ArgMin": [((X,), {"axis": -1, "keepdims": 0}), ((X,), {"axis": 1})],
    "Cast": [((X * 9,), {"to": TensorProto.INT64}), ((BOOLS[0],), {"to": TensorProto.FLOAT})],
    "Clip": [((X, np.float32(-0.5), np.float32(0.5)), {})],
    "Concat": [((X, Y), {"axis": 1}), ((ints(1), ints(2), ints(3)), {"axis": 0})],
    "Conv": [
        ((draw(1, 2, 5, 5), draw(3, 2, 3, 3), draw(3)), {"pads": [1, 1, 1, 1]}),
        ((draw(1, 2, 6, 6), draw(3, 2, 3, 3)), {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
        ((draw(1, 2, 4, 5), draw(3, 2, 3, 3)), {"pads": [0, 1, 2, 0]}),
        ((draw(2, 1, 5), draw(1, 1, 1)), {"pads": [0, 0], "kernel_shape": [1]}),
    ],
    "Div": [((X, Y), {})],
    "Equal": [((ROWS, np.float32(1)), {})],
    "Exp": [((X,), {})],
    "Expand": [((draw(1, 1, 4), ints(1, 3, 4)), {}), ((draw(2, 1), ints(3)), {})],
    "Gather": [
        ((X, ints(1, 0, 1)), {"axis": 1}),
        ((X, np.array(1)), {"axis": 0}),
        ((ROWS, np.array([[0, 2], [1, 1]])), {"axis": 0}),
        ((ROW, np.array(2)), {}),
    ],
    "Gelu": [((X,), {"approximate": "tanh"}), ((X,), {})],
    "Greater": [((ROWS, np.float32(0)), {})],
    "GreaterOrEqual": [((ROWS, np.float32(0)), {})],
    "Identity": [((X,), {})],
    "InstanceNormalization": [((X, draw(3), draw(3)), {"epsilon": 1e-6})],
    "LayerNormalization": [
        ((X, ROW, draw(4)), {"axis": -1, "epsilon": 1e-6}),
        ((X, ROW), {"axis": -1, "epsilon": 1e-6}),
    ],
    "LessOrEqual": [((ROWS, np.float32(0)), {})],
    "MatMul": [((X, draw(4, 5)), {}), ((draw(3, 2), draw(2, 1, 2, 5)), {})],
    "Max": [((X, np.float32(0)), {})],
    "Min": [((X, np.float32(0)), {}), ((ints(3), ints(2)), {})],
    "Mul": [((X, Y), {})],
    "Or": [(BOOLS, {})],
    "Pad": [((X, ints(0, 1, 0, 0, 2, 3), np.float32(7)), {})],
    "ReduceL2": [REDUCE],
    "ReduceMax": [REDUCE, ((X, ints(-2, -1)), {"keepdims": 1})],
    "ReduceMin": [REDUCE],
    "ReduceSum": [REDUCE, ((X, ints(0, 2)), {})],
    "ReduceSumSquare": [REDUCE],
    "Reshape": [((X, ints(0, -1)), {}), ((X, ints(4, 6)), {})],
    "Resize": [
        (
            (draw(1, 2, 3, 3), None, np.array([1, 1, 2, 2], np.float32)),
            {
                "mode": "nearest",
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "floor",
            },
        )
    ],
    "Shape": [((X,), {}), ((X,), {"start": 1, "end": 2})],
    "Sigmoid": [((X,), {})],
    "Slice": [((X, ints(1), ints(3), ints(1)), {}), ((X, ints(0, 1), ints(1, 9), ints(0, 2)), {})],
    "Softmax": [((X,), {"axis": -1})],
    "Split": [((X, ints(1, 3)), {"axis": 2})],
    "Sqrt": [((np.abs(X),), {})],
    "Squeeze": [((draw(2, 1, 3, 1), ints(1)), {}), ((draw(2, 1, 3, 1), ints(-1, 1)), {})],
    "Sub": [((X, Y), {})],
    "Transpose": [((X,), {"perm": [2, 0, 1]})],
    "Unsqueeze": [((X, ints(-1)), {}), ((X, ints(0, 3)), {}), ((X, ints(-1, -2)), {})],
    "Where": [((BOOLS[0], X, ROW), {}), ((np.array(True), X, Y), {})],
}


def one_node(folder: Path, op: str, inputs: Any, attributes: Any, dtype: Any = None) -> Path:
    """A file with one node; every input after the first is a constant."""
    arrays = [None if x is None else np.asarray(x) for x in inputs]
    if dtype:
        arrays = [x if x is None or x.dtype != np.float32 else x.astype(dtype) for x in arrays]
    given = ["" if x is None else f"x{i}" for i, x in enumerate(arrays)]
    outputs = [f"y{i}" for i in range(2 if op == "Split" else 1)]
    first = helper.make_tensor_value_info(
        "x0", helper.np_dtype_to_tensor_dtype(arrays[0].dtype), arrays[0].shape
    )
    node = helper.make_node(op, given, outputs, f"layer/{op}_1", **attributes)
    constants = [
        numpy_helper.from_array(x, f"x{i}") for i, x in enumerate(arrays) if i and x is not None
    ]
    graph = helper.make_graph([node], "one", [first], [], constants)
    model = helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v for v in graph.value_info}
    for name in outputs:
        model.graph.output.append(types.get(name, onnx.ValueInfoProto(name=name)))
    path = folder / "one.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def run_one(path: Path, first: Any) -> list[NDArray[Any]]:
    found = TorchGraph(path).run({"x0": first})
    return [found[name] for name in sorted(found)]


def test_every_operator_has_a_case() -> None:
    assert set(CASES) == set(OPERATORS)


@pytest.mark.parametrize(
    ("op", "case"), [(op, i) for op, cases in CASES.items() for i in range(len(cases))]
)
def test_an_operator_computes_what_onnx_runtime_does(op: str, case: int, tmp_path: Path) -> None:
    inputs, attributes = CASES[op][case]
    path = one_node(tmp_path, op, inputs, attributes)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x0": np.asarray(inputs[0])})
    found = run_one(path, inputs[0])
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-6)


# --- fp16


def test_products_add_up_in_fp32_and_round_once(tmp_path: Path) -> None:
    """2048 + 1 is no fp16 number: a sum kept in fp16 would stay at 2048."""
    x = np.array([[2048, *[1] * 9]], np.float32)
    found = run_one(one_node(tmp_path, "MatMul", (x, np.ones((10, 1), np.float32)), {}, "f2"), x)
    assert found[0].dtype == np.float16
    assert found[0].item() == np.float16(2057) == 2056
    chained = np.float16(2048)
    for _ in range(9):
        chained = np.float16(chained + np.float16(1))
    assert chained == 2048


def test_every_result_is_rounded_to_fp16(tmp_path: Path) -> None:
    x = draw(64)
    for op, expected in (("Exp", np.exp), ("Sigmoid", lambda v: 1 / (1 + np.exp(-v)))):
        found = run_one(one_node(tmp_path, op, (x,), {}, "f2"), x)[0]
        half = x.astype(np.float16).astype(np.float64)
        # one unit in the last place: the function itself is computed in fp32
        np.testing.assert_array_max_ulp(found, expected(half).astype(np.float16), maxulp=1)


def test_beyond_65504_is_infinite(tmp_path: Path) -> None:
    x = np.array([60000.0, -60000.0, 100.0], np.float32)
    found = run_one(one_node(tmp_path, "Add", (x, x), {}, "f2"), x)[0]
    np.testing.assert_array_equal(found, np.array([np.inf, -np.inf, 200], np.float16))
    cast = run_one(one_node(tmp_path, "Cast", (x * 2,), {"to": TensorProto.FLOAT16}), x * 2)[0]
    assert np.isinf(cast[:2]).all() and cast.dtype == np.float16


def test_a_half_graph_differs_from_fp32_by_rounding(
    golden_bundle: Callable[[str], Path],
) -> None:
    bundle = golden_bundle("seeded-adaln")
    manifest = read_manifest(bundle)
    f_hat = RANDOM.standard_normal(manifest.graph("fp32", names.DECODER).inputs[0].shape)
    full, half = (
        TorchGraph(bundle / manifest.graph(p, names.DECODER).file).run({names.F_HAT: f_hat})
        for p in ("fp32", "fp16")
    )
    difference = np.abs(full[names.IMAGE] - half[names.IMAGE]).max()
    assert 1e-5 < difference < 3e-2


# --- whole graphs


@pytest.mark.parametrize("case", ["seeded-adaln", "seeded-shared-aln"])
def test_static_graphs_compute_what_onnx_runtime_does(
    case: str, golden_bundle: Callable[[str], Path]
) -> None:
    bundle = golden_bundle(case)
    manifest = read_manifest(bundle)
    special = {
        names.TOP_K: np.array(20),
        names.TOP_P: np.array(0.9),
        names.TEMPERATURE: np.array(0.8),
        names.CFG: np.array(1.5),
    }
    for name, info in manifest.graphs["fp32"].items():
        if name == names.STEP:
            continue
        inputs = {
            t.name: np.asarray(special.get(t.name, RANDOM.random_sample(t.shape)), t.dtype)
            for t in info.inputs
        }
        session = onnxruntime.InferenceSession(
            str(bundle / info.file), providers=["CPUExecutionProvider"]
        )
        outputs = [t.name for t in info.outputs]
        expected = dict(zip(outputs, session.run(outputs, inputs), strict=True))
        found = TorchGraph(bundle / info.file).run(inputs)
        assert set(found) == set(outputs)
        for tensor, want in expected.items():
            assert found[tensor].dtype == want.dtype
            np.testing.assert_allclose(
                found[tensor], want, rtol=1e-4, atol=1e-4, err_msg=f"{name} {tensor}"
            )


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
def test_a_generation_is_that_of_the_runtime(
    layout: Any, golden_bundle: Callable[[str], Path]
) -> None:
    bundle = golden_bundle("seeded-adaln")
    manifest = read_manifest(bundle)
    labels, total = [1, 2][: manifest.batch], manifest.model.total_tokens
    loop = ScaleLoop(bundle, manifest, OrtCpuBackend(1), "fp32", layout)
    try:
        draws = np.stack([uniforms(3, 5 + i, total) for i in range(manifest.batch)])
        image = loop.run(labels, draws, manifest.defaults).copy()
        tokens = loop.tokens()
    finally:
        loop.close()
    if layout == "shared":
        kept = {k: v for k, v in manifest.graphs["fp32"].items() if not k.startswith("scale_")}
        manifest.graphs["fp32"].clear()  # type: ignore[attr-defined]
        manifest.graphs["fp32"].update(kept)  # type: ignore[attr-defined]
    found = generate(bundle, manifest, "fp32", labels, first=5, seed=3)
    for got, want in zip(found.tokens, tokens, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(found.image, image, atol=1e-4)


# --- what is held, and what is said


def chain(folder: Path, length: int) -> Path:
    """x · x0 · x0 …, with names that tell the order."""
    nodes = [
        helper.make_node("Mul", [f"v{i}", "x0"], [f"v{i + 1}"], f"n{i}") for i in range(length)
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [8]) for n in ("v0", f"v{length}")]
    graph = helper.make_graph(
        nodes, "chain", value[:1], value[1:], [numpy_helper.from_array(draw(8), "x0")]
    )
    model = helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    (folder / "chain.onnx").write_bytes(model.SerializeToString())
    return folder / "chain.onnx"


def test_values_are_let_go_after_their_last_use(tmp_path: Path) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def see(node: str, name: str, value: torch.Tensor) -> None:
        assert (node, name) == (f"n{len(seen)}", f"v{len(seen) + 1}")
        seen.append(weakref.ref(value))
        alive = [i for i, ref in enumerate(seen) if ref() is not None]
        assert set(alive) <= {0, len(seen) - 2, len(seen) - 1}  # the first is asked for

    found = TorchGraph(chain(tmp_path, 6)).run({"v0": draw(8)}, also=["v1"], on_value=see)
    assert len(seen) == 6 and set(found) == {"v1", "v6"}


def test_weights_are_mapped_only_while_they_are_used(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    bundle = golden_bundle("seeded-adaln")
    manifest = read_manifest(bundle)
    # files of its own: sessions of other tests may still map those of the bundle
    file = shutil.copytree(bundle / "fp32", tmp_path / "fp32") / names.graph_file(names.CONDITION)
    weights = str(file.with_name(names.WEIGHTS))
    mapped: list[int] = []

    def see(node: str, name: str, value: torch.Tensor) -> None:
        mapped.append(maps.read_text().count(weights))

    graph = TorchGraph(file)
    graph.run({names.LABELS: np.zeros(manifest.rows, np.int64)}, on_value=see)
    assert max(mapped) <= 2
    assert weights not in maps.read_text()


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    path = one_node(tmp_path, "CumSum", (draw(4), np.array(0)), {})
    with pytest.raises(ExportError, match=r"^one: no arithmetic is known for layer/CumSum_1"):
        TorchGraph(path)


def test_a_node_that_fails_is_named(tmp_path: Path) -> None:
    graph = TorchGraph(one_node(tmp_path, "Gather", (ROWS, ints(7)), {"axis": 0}))
    with pytest.raises(ExportError, match=r"^one: layer/Gather_1 \(Gather\) failed: .*7") as caught:
        graph.run({"x0": ROWS})
    assert "\n" not in str(caught.value)
