"""Counts the operations of an exported graph, for tests of what `plan` predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from var_deploy import names


def count_operations(graph: Any) -> tuple[int, int]:
    """Operations of all products in a graph of known shapes: (fp16 or int8, fp32)."""
    import onnx
    from onnx import shape_inference

    model = graph.model(lambda name: (names.WEIGHTS, 0, 0))
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes: dict[str, Sequence[int]] = {t.name: list(t.dims) for t in inferred.initializer}
    kinds = {t.name: t.data_type for t in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        tensor = value.type.tensor_type
        shapes[value.name] = [d.dim_value for d in tensor.shape.dim]
        kinds[value.name] = tensor.elem_type
    reduced = full = 0
    for node in inferred.node:
        if node.op_type in ("MatMul", "MatMulInteger"):
            each = shapes[node.input[0]][-1]
        elif node.op_type in ("Conv", "QLinearConv"):
            each = math.prod(shapes[node.input[1 if node.op_type == "Conv" else 3]][1:])
        else:
            continue
        operations = 2 * each * math.prod(shapes[node.output[0]])
        if kinds[node.output[0]] == onnx.TensorProto.FLOAT:
            full += operations
        else:
            reduced += operations
    return reduced, full
