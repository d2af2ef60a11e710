"""int8 arithmetic: what is rounded, and that ONNX Runtime adds it up exactly on this processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import IR_VERSION, OPSET, GraphBuilder
from var_deploy.export.int8.operators import (
    ConvRanges,
    Kernel,
    Range,
    dequantize,
    kernel_rows,
    quantize,
    round_rows,
    static_conv,
    weight_scale,
)
from var_deploy.export.lint.int8 import LARGEST_PAIR, largest_pair

Array = NDArray[Any]


def has_vnni() -> bool:
    """Whether this processor adds 8-bit products in 32 bits, as far as one can know."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx2" not in flags or bool({"avx512_vnni", "avx_vnni"} & set(flags))


WITHOUT_VNNI = pytest.mark.skipif(
    has_vnni(), reason="this processor is no x86 or has VNNI: nothing is cut off here"
)


def adversarial(kind: str, width: int) -> NDArray[np.float32]:
    """[6, width] rows whose neighbours add up to as much as they can."""
    rows = np.ones((6, width), np.float32)
    if kind == "alternating":
        rows[:, 1::2] = -1
    elif kind == "negative":
        rows *= -1
    elif kind == "lonely":  # one large value, its neighbour small
        rows *= 0.01
        rows[:, width // 2] = -3
    elif kind == "half":  # 0.5 rounds either way
        rows[:, 1::2] = 0.503
    elif kind == "mixed signs":
        rows *= np.sign(np.random.default_rng(width).standard_normal((6, width)))
    elif kind == "zero":
        rows *= 0
    rows[1] *= 1e-5  # a scale a row: sizes have no influence on each other
    rows[2] *= 1e4
    return rows


KINDS = ("equal", "alternating", "negative", "lonely", "half", "mixed signs", "zero")


@pytest.mark.parametrize("width", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_no_two_neighbours_come_to_more_than_128(kind: str, width: int) -> None:
    rows = adversarial(kind, width)
    q = round_rows(rows)
    assert largest_pair(q) <= LARGEST_PAIR
    scale = weight_scale(rows)
    assert scale.dtype == np.float32 and scale.shape == (6,)
    assert np.isfinite(scale).all() and (scale > 0).all()
    error = np.abs(rows - scale[:, None] * q)
    assert (error <= 0.501 * scale[:, None]).all()
    # one pair of every row uses what there is to use
    assert kind == "zero" or all(largest_pair(row[None]) >= 126 for row in q)


@pytest.mark.parametrize("seed", range(8))
def test_no_two_neighbours_of_random_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.standard_t(2 + seed, (64, 96 + seed)).astype(np.float32)
    q = round_rows(rows)
    # a loop, so that the fast form is not checked by itself
    for row in q.astype(int):
        for i in range(0, len(row), 2):
            pair = row[i : i + 2]
            assert sum(v for v in pair if v > 0) <= 128 and sum(v for v in pair if v < 0) >= -128
    assert largest_pair(q) <= LARGEST_PAIR
    assert np.abs(rows - weight_scale(rows)[:, None] * q).max() <= 0.501 * weight_scale(rows).max()


def test_largest_pair_counts_neighbours_of_one_sign() -> None:
    assert largest_pair(np.array([[127, -127, 3, 4]], np.int8)) == 127
    assert largest_pair(np.array([[0, 127, 127, 0]], np.int8)) == 127  # no pair: 1 and 2
    assert largest_pair(np.array([[1, 0, 100, 30]], np.int8)) == 130
    assert largest_pair(np.array([[-128, -1], [5, 5]], np.int8)) == 129
    assert largest_pair(np.array([[0, 0, -90]], np.int8)) == 90


# --- sums on this processor


def run(
    node: onnx.NodeProto, kind: int, inputs: dict[str, Array], weights: dict[str, Array]
) -> Any:
    """The node in ONNX Runtime, optimised as in a bundle, its weights constants."""
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(k, TensorProto.UINT8, v.shape) for k, v in inputs.items()],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    model = helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0]


def integer_product(x: Array, q_rows: Array, zero: int = 0) -> Array:
    """MatMulInteger of x [M, in] and weights [out, in]."""
    node = helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])
    weights = {"w": np.ascontiguousarray(q_rows.T), "zero": np.array(zero, np.uint8)}
    found: Array = run(node, TensorProto.INT32, {"x": x}, weights)
    return found


def exact_product(x: Array, q_rows: Array, zero: int = 0) -> Array:
    product: Array = (x.astype(np.int64) - zero) @ q_rows.T.astype(np.int64)
    return product


@pytest.mark.parametrize("zero", [0, 131])
@pytest.mark.parametrize(
    ("count", "width", "out"),
    [(1, 1, 1), (1, 64, 17), (2, 3, 5), (5, 7, 16), (9, 129, 40), (33, 192, 64), (64, 1024, 96)],
)
def test_products_with_inputs_of_255_are_exact(
    count: int, width: int, out: int, zero: int
) -> None:
    random = np.random.default_rng(count)
    rows = [adversarial(kind, width) for kind in KINDS]
    rows.append(random.standard_normal((out, width)).astype(np.float32))
    q = round_rows(np.concatenate(rows))
    for x in (
        np.full((count, width), 255, np.uint8),
        random.choice(np.array([0, 255], np.uint8), (count, width)),
        random.integers(0, 256, (count, width)).astype(np.uint8),
    ):
        found = integer_product(x, q, zero)
        np.testing.assert_array_equal(found, exact_product(x, q, zero))


@WITHOUT_VNNI
def test_plain_rounding_is_cut_off_without_vnni() -> None:
    """The control: the usual scale, largest weight to 127, gives other integers here."""
    rows = adversarial("equal", 64)
    q = np.rint(rows / np.abs(rows).max(axis=1, keepdims=True) * 127).astype(np.int8)
    x = np.full((9, 64), 255, np.uint8)
    assert (integer_product(x, q) < exact_product(x, q)).all()


def rounded_conv(x: Array, q: Array, zero: int, bias: Array) -> Array:
    """QLinearConv of x [1, in, s, s] and q [out, in, h, w], all scales 1, no padding."""
    one, nothing = np.array(1, np.float32), np.array(0, np.uint8)
    weights = {
        "x_zero": np.array(zero, np.uint8),
        "w": q,
        "w_scale": np.ones(len(q), np.float32),
        "w_zero": np.zeros(len(q), np.int8),
        "one": one,
        "y_zero": nothing,
        "bias": bias.astype(np.int32),
    }
    order = ["x", "one", "x_zero", "w", "w_scale", "w_zero", "one", "y_zero", "bias"]
    node = helper.make_node("QLinearConv", order, ["y"], kernel_shape=list(q.shape[2:]))
    found: Array = run(node, TensorProto.UINT8, {"x": x}, weights)
    return found


def rounded_kernel(rows: Array, shape: tuple[int, ...]) -> Array:
    """q [out, in, h, w] of rows [out, h·w·in], as `static_conv` orders them."""
    out, width, *sides = shape
    return round_rows(rows).reshape(out, *sides, width).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("zero", [0, 131])
@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("width", [1, 3, 16, 64])
def test_convolutions_with_inputs_of_255_are_exact(width: int, side: int, zero: int) -> None:
    """A bias of 100 less the exact sum leaves 100, to the last digit, whatever the sum."""
    random = np.random.default_rng(width)
    taps = width * side * side
    rows = [adversarial(kind, taps) for kind in KINDS]
    rows.append(random.standard_normal((6, taps)).astype(np.float32))
    flat = np.concatenate(rows)
    q = rounded_kernel(flat, (len(flat), width, side, side))
    np.testing.assert_array_equal(kernel_rows(q), round_rows(flat))
    for x in (
        np.full((1, width, side, side), 255, np.uint8),
        random.choice(np.array([0, 255], np.uint8), (1, width, side, side)),
    ):
        exact = (q.astype(np.int64) * (x.astype(np.int64) - zero)).sum(axis=(1, 2, 3))
        found = rounded_conv(x, q, zero, 100 - exact)
        np.testing.assert_array_equal(found.ravel(), 100)
    # a larger map takes other kernels
    x = np.full((1, width, 14, 14), 255, np.uint8)
    exact = q.astype(np.int64).sum(axis=(1, 2, 3)) * (255 - zero)
    np.testing.assert_array_equal(rounded_conv(x, q, zero, 100 - exact), 100)


@WITHOUT_VNNI
def test_plainly_rounded_convolutions_are_cut_off_without_vnni() -> None:
    q = np.full((4, 16, 3, 3), 127, np.int8)
    x = np.full((1, 16, 14, 14), 255, np.uint8)
    exact = q.astype(np.int64).sum(axis=(1, 2, 3)) * 255
    assert (rounded_conv(x, q, 0, 100 - exact) < 100).all()


# --- ranges


@pytest.mark.parametrize(
    ("low", "high", "zero"),
    [
        *((-1.0, 3.0, 64), (-2.5, 0.0, 255), (0.5, 3.0, 0), (-3.0, -0.5, 255), (0.0, 0.0, 0)),
        *((2.0, 2.0, 0), (-2.0, -2.0, 255), (-1e-9, 1e-9, 0), (-1e6, 1e-3, 255)),
    ],
)
def test_a_range_holds_zero_and_both_ends(low: float, high: float, zero: int) -> None:
    found = Range(low=low, high=high)
    assert found.zero_point == zero
    assert found.scale == np.float32(found.scale) > 0
    for value in (low, high, 0.0, (low + high) / 2):
        q = np.clip(np.rint(value / found.scale) + zero, 0, 255)
        back = (q - zero) * found.scale
        # the zero point is rounded as well, so an end may be a step off
        assert abs(back - value) <= found.scale * 1.001
    assert (np.float32(zero) - zero) * found.scale == 0


def test_a_range_is_what_onnx_rounds_to() -> None:
    found = Range(low=-0.7, high=2.1)
    b = GraphBuilder("ends", GraphForm(precision="int8"))
    b.input("x", np.float32, (5,))
    b.output("y", np.float32, (5,))
    b.op("Identity", dequantize(b, quantize(b, "x", found), found), out="y")
    session = onnxruntime.InferenceSession(b.model(str).SerializeToString())
    x = np.array([-9.0, -0.7, 0.0, 2.1, 9.0], np.float32)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, [-0.7, -0.7, 0.0, 2.1, 2.1], atol=0.6 * float(found.scale))
    assert y[2] == 0


# --- the two operators of the graphs


def compiled(b: GraphBuilder, tensors: dict[str, Array], folder: Path) -> Any:
    """A session over the graph, its weights made from checkpoint tensors."""
    data, places = b"", {}
    for name, weight in b.weights.items():
        values = np.ascontiguousarray(weight.make(tensors.__getitem__), weight.dtype)
        assert values.shape == weight.shape
        places[name] = ("weights.bin", len(data), values.nbytes)
        data += values.tobytes()
    (folder / "weights.bin").write_bytes(data)
    (folder / "graph.onnx").write_bytes(b.model(places.__getitem__).SerializeToString())
    return onnxruntime.InferenceSession(str(folder / "graph.onnx"))


def norm_ratio(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_linear_layer_rounds_what_it_is_given(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = (random.standard_normal((40, 65)) * np.geomspace(0.01, 10, 40)[:, None]).astype("f4")
    bias = random.standard_normal(40).astype("f4")
    b = GraphBuilder("linear", GraphForm(precision="int8"))
    b.input("x", np.float32, (7, 65))
    b.output("y", np.float32, (7, 40))
    y = b.linear("x", "layer.weight", 65, 40, b.weight("layer.bias", (40,)))
    b.op("Identity", y, out="y")
    session = compiled(b, {"layer.weight": weight, "layer.bias": bias}, tmp_path)
    for shift in (0.0, 4.0, -4.0):  # both signs, positive only, negative only
        x = random.standard_normal((7, 65)).astype("f4") + np.float32(shift)
        (found,) = session.run(None, {"x": x})
        expected = x @ weight.T
        assert norm_ratio(found - bias, expected) < 0.012
        # a scale an output: small outputs are as good as large ones
        assert norm_ratio(found[:, :8] - bias[:8], expected[:, :8]) < 0.02


def test_a_convolution_stays_within_its_ranges(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((12, 6, 3, 3)).astype("f4")
    bias = random.standard_normal(12).astype("f4")
    x = np.maximum(random.standard_normal((2, 6, 9, 9)), -0.3).astype("f4")
    expected = torch.conv2d(*(torch.from_numpy(v) for v in (x, weight, bias)), padding=1).numpy()
    ranges = ConvRanges(
        input=Range(low=float(x.min()), high=float(x.max())),
        output=Range(low=float(expected.min()), high=float(expected.max())),
    )
    kernel = Kernel(name="c.weight", shape=weight.shape, make=lambda read: read("c.weight"))
    b = GraphBuilder("conv", GraphForm(precision="int8"))
    b.input("x", np.float32, x.shape)
    b.output("y", np.float32, expected.shape)
    y = static_conv(b, quantize(b, "x", ranges.input), "c", kernel, ranges, [1] * 4)
    b.op("Identity", dequantize(b, y, ranges.output), out="y")
    session = compiled(b, {"c.weight": weight, "c.bias": bias}, tmp_path)
    (found,) = session.run(None, {"x": x})
    assert norm_ratio(found, expected) < 0.02
    (clipped,) = session.run(None, {"x": 50 * x})
    step = float(ranges.output.scale)
    assert clipped.max() <= ranges.output.high + step and clipped.min() >= ranges.output.low - step
