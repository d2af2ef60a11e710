"""The graph that shows whether int8 is computed correctly, see `runtime/backends/int8_check.py`.

    python -m var_deploy.export.int8.probe

writes it beside the runtime, which ships it, so that a device needs no onnx. It has the operators
of int8 bundles in the forms that ONNX Runtime fuses. Weights are computed from patterns, which a
runtime folds while it loads: the file stays small.
"""

from __future__ import annotations

import numpy as np

from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.runtime.backends import int8_check as known


def build_probe() -> GraphBuilder:
    b = GraphBuilder("int8_probe", GraphForm(precision="fp32"))
    for name, width_in, columns, images, biased in known.PRODUCTS:
        rows: tuple[int | str, ...] = ("M",) if images == 1 else ("M", images)
        x = b.input(f"x.{name}", np.float32, (*rows, width_in))
        for place, width in enumerate(columns):
            # each product has a rounding of its own, as in a bundle; equal ones are merged
            q, step, zero = b.ops("DynamicQuantizeLinear", (x,), 3)
            matrix = _weights(b, width_in, width)
            sums = b.cast(b.op("MatMulInteger", q, matrix, zero), np.float32)
            scale = b.op("Mul", step, b.constant(known.column_scales(width)))
            out = f"y.{name}.{place}"
            y = b.op("Mul", sums, scale, out=None if biased else out)
            if biased:
                b.op("Add", y, b.constant(known.bias(width)), out=out)
            b.output(out, np.float32, (*rows, width))
    for name, channels, outputs, side, pads in known.CONVOLUTIONS:
        x = b.input(f"x.{name}", np.uint8, (1, channels, known.SIDE, known.SIDE))
        zero = b.constant(known.CONV_ZERO, np.uint8)
        b.op(
            "QLinearConv",
            *(x, b.constant(known.STEP, np.float32), zero),
            _weights(b, outputs, channels, side, side),
            b.constant(known.conv_scales(outputs)),
            b.constant(np.zeros(outputs, np.int8)),
            *(b.constant(known.CONV_STEP, np.float32), zero),
            b.constant(known.conv_bias(outputs)),
            kernel_shape=[side, side],
            pads=list(pads),
            out=f"y.{name}",
        )
        b.output(f"y.{name}", np.uint8, (1, outputs, known.SIDE, known.SIDE))
    return b


def _weights(b: GraphBuilder, *shape: int) -> str:
    """Return the weights of `known.weights` as graph operators."""

    def number(value: int) -> str:
        return b.constant(value, np.int64)

    count = int(np.prod(shape))
    n = b.op("Range", number(0), number(count), number(1))
    mixed = b.op("Add", b.op("Mul", b.op("Mul", n, n), number(31)), b.op("Mul", n, number(17)))
    small = b.op("Add", b.op("Mod", mixed, number(127)), number(-63))
    return b.reshape(b.cast(small, np.int8), *shape)


def probe_bytes() -> bytes:
    """Return the bytes of the ONNX file."""

    def locate(weight: str) -> tuple[str, int, int]:
        raise KeyError(weight)  # none is stored

    data: bytes = build_probe().model(locate).SerializeToString(deterministic=True)
    return data


if __name__ == "__main__":
    known.GRAPH.write_bytes(probe_bytes())
