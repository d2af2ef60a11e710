"""Normalisation layers as ONNX operators."""

from __future__ import annotations

import numpy as np

from var_deploy.export.graphs.builder import GraphBuilder


def rms_norm(b: GraphBuilder, x: str, key: str, width: int, eps: float) -> str:
    """x · rsqrt(mean(x²) + eps) · weight over the last axis, in fp32 (arXiv 1910.07467).

    `key` is the checkpoint's weight [width]; the input and the result are fp32.
    """
    mean = b.op("Mul", b.op("ReduceSumSquare", x, b.ints(-1), keepdims=1), _float(b, 1 / width))
    root = b.op("Sqrt", b.op("Add", mean, _float(b, eps)))
    return b.op("Mul", b.op("Div", x, root), b.weight(key, (width,)))


def _float(b: GraphBuilder, value: float) -> str:
    return b.constant(value, np.float32)
