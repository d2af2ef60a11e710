"""Tiny graphs that measure a machine: products and convolutions as fast as a library runs them.

    python -m var_deploy.export.graphs.probes

writes them beside `bench`, which ships them, so that a device needs no onnx. Their weights are not
stored but computed: a runtime folds them while it loads, and packs them as it packs any others.
They vary, because a processor may clock higher where every bit stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from var_deploy.bench import rates
from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import GraphBuilder

FOLDER = Path(rates.__file__).parent
LARGEST = 63  # of an int8 weight: more would overflow where products are added in 16 bits


def _varied(b: GraphBuilder, dtype: DTypeLike, *shape: int) -> str:
    """Return sin 0, sin 1, sin 2, … as a tensor; times 63 in int8."""
    zero, one = b.constant(0, np.float32), b.constant(1, np.float32)
    numbers = b.op("Range", zero, b.constant(np.prod(shape), np.float32), one)
    values = b.op("Sin", numbers)
    if np.dtype(dtype) == np.int8:
        whole = b.op("Mul", values, b.constant(LARGEST, np.float32))
        values = b.cast(b.op("Round", whole), np.int8)
    return b.reshape(values, *shape)


def gemm_fp32() -> GraphBuilder:
    """Build a probe of fp32 products: x [M, K] · W [K, N] → y [M, N]."""
    b = GraphBuilder("gemm_fp32", GraphForm(precision="fp32"))
    b.input("x", np.float32, ("M", rates.K))
    b.op("MatMul", "x", _varied(b, np.float32, rates.K, rates.N), out="y")
    b.output("y", np.float32, ("M", rates.N))
    return b


def gemm_int8() -> GraphBuilder:
    """Build a probe of int8 products: W in int8 with a scale per column, x quantised at run
    time."""
    b = GraphBuilder("gemm_int8", GraphForm(precision="fp32"))
    b.input("x", np.float32, ("M", rates.K))
    quantised, scale, zero = b.ops("DynamicQuantizeLinear", ("x",), 3)
    weights = _varied(b, np.int8, rates.K, rates.N)
    sums = b.op("MatMulInteger", quantised, weights, zero)
    columns = b.op("Expand", b.constant(1 / LARGEST, np.float32), b.ints(rates.N))
    b.op("Mul", b.cast(sums, np.float32), b.op("Mul", scale, columns), out="y")
    b.output("y", np.float32, ("M", rates.N))
    return b


def conv_fp32() -> GraphBuilder:
    """Build a probe of fp32 convolution: 3×3 on x [1, C, side, side] to as many channels."""
    b = GraphBuilder("conv_fp32", GraphForm(precision="fp32"))
    c, side = rates.CHANNELS, rates.SIDE
    b.input("x", np.float32, (1, c, side, side))
    b.op("Conv", "x", _varied(b, np.float32, c, c, 3, 3), pads=[1, 1, 1, 1], out="y")
    b.output("y", np.float32, (1, c, side, side))
    return b


def conv_int8() -> GraphBuilder:
    """Build a probe of int8 convolution: uint8 to uint8, int8 weights with a scale per channel."""
    b = GraphBuilder("conv_int8", GraphForm(precision="fp32"))
    c, side = rates.CHANNELS, rates.SIDE
    b.input("x", np.uint8, (1, c, side, side))
    scale, zero = b.constant(1 / 40, np.float32), b.constant(128, np.uint8)
    weights = (
        _varied(b, np.int8, c, c, 3, 3),
        b.constant(np.full(c, 1 / LARGEST, np.float32)),
        b.constant(np.zeros(c, np.int8)),
    )
    result = (b.constant(1.0, np.float32), zero)
    b.op("QLinearConv", "x", scale, zero, *weights, *result, pads=[1, 1, 1, 1], out="y")
    b.output("y", np.uint8, (1, c, side, side))
    return b


PROBES: Mapping[str, Callable[[], GraphBuilder]] = {
    "gemm_fp32": gemm_fp32,
    "gemm_int8": gemm_int8,
    "conv_fp32": conv_fp32,
    "conv_int8": conv_int8,
}


def probe_bytes(name: str) -> bytes:
    """Return the ONNX file of one probe."""

    def locate(weight: str) -> tuple[str, int, int]:
        raise KeyError(weight)  # none is stored

    data: bytes = PROBES[name]().model(locate).SerializeToString(deterministic=True)
    return data


if __name__ == "__main__":
    for probe in PROBES:
        (FOLDER / f"{probe}.onnx").write_bytes(probe_bytes(probe))
