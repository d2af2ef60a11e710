"""Checks that an int8 graph is quantised as documented, from the ONNX file and its weights.

These graphs run on CPUs only, so TensorRT's limits do not matter here. The matrices must be stored
in 8 bits, once, in weights.bin, and every processor must compute the same integers with them:
`int8.operators.weight_scale` says which sums must stay small for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from var_deploy import names
from var_deploy.export.graphs.builder import OPSET
from var_deploy.export.int8.operators import kernel_rows

# With inputs up to 255, two products that are added in 16 bits: 255 · 128 < 2^15.
LARGEST_PAIR = 128
# operator → position of its rounded weight
ROUNDED_WEIGHT = {"MatMulInteger": 1, "QLinearConv": 3}
KERNEL_ZERO_POINT = 5  # of QLinearConv
# first parts of the names of nodes whose products with weights are int8
ROUNDED_SCOPES = ("blocks.", "head_nm.", "shared_ada_lin.", "text_blocks.")

Rounded = tuple[str, int]  # a weight: file and offset


def lint_int8(path: Path, checked: set[Rounded]) -> list[str]:
    """Return the broken rules of the graph at `path`, one line per rule, each naming the node.

    `checked` holds the weights that were found correct in other graphs over the same file; it
    grows.
    """
    model = onnx.load(str(path), load_external_data=False)
    return [*_format(model), *_nodes(model.graph, path.parent, checked)]


def _format(model: onnx.ModelProto) -> Iterator[str]:
    for opset in model.opset_import:
        if opset.domain or opset.version > OPSET:
            found = f"{opset.domain or 'ONNX'} {opset.version}"
            yield f"operators of {found}: only those of ONNX up to opset {OPSET} are used"
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            yield f"{tensor.name}: is fp16 in an int8 graph"


def _nodes(graph: onnx.GraphProto, folder: Path, checked: set[Rounded]) -> Iterator[str]:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    told: set[str] = set()  # a batch multiplies with each weight once per image
    for node in graph.node:
        scope = node.name.partition("/")[0]
        if node.op_type in ROUNDED_WEIGHT:
            name = node.input[ROUNDED_WEIGHT[node.op_type]]
            problem = "it is computed" if name not in constants else ""
            problem = problem or _weight(constants[name], node.op_type, folder, checked)
            if not problem and node.op_type == "QLinearConv":
                zero = onnx.numpy_helper.to_array(constants[node.input[KERNEL_ZERO_POINT]])
                problem = "its zero point is not 0" if zero.any() else ""
            if problem and name not in told:
                told.add(name)
                yield f"{node.name}: weight {name}: {problem}"
            continue
        weighted = node.op_type == "MatMul" and not constants.keys().isdisjoint(node.input)
        if weighted and scope.startswith(ROUNDED_SCOPES):
            yield f"{node.name}: MatMul with a weight runs in fp32, it should run in int8"


def _weight(
    tensor: onnx.TensorProto, operator: str, folder: Path, checked: set[Rounded]
) -> str:
    """Return the fault of a quantised weight, "" if there is none."""
    if tensor.data_type != TensorProto.INT8:
        return f"is {TensorProto.DataType.Name(tensor.data_type).lower()}, expected int8"
    where = {entry.key: entry.value for entry in tensor.external_data}
    if where.get("location") != names.WEIGHTS:
        return f"does not lie in {names.WEIGHTS}"
    place = (where["location"], int(where["offset"]))
    if place in checked:
        return ""
    shape = tuple(tensor.dims)
    values: NDArray[Any] = np.memmap(folder / place[0], np.int8, "r", place[1], shape)
    largest = largest_pair(values.T if operator == "MatMulInteger" else kernel_rows(values))
    if largest > LARGEST_PAIR:
        return (
            f"two neighbours come to {largest}, more than {LARGEST_PAIR}: processors without VNNI "
            "would cut off their sum"
        )
    checked.add(place)
    return ""


def largest_pair(rows: NDArray[Any]) -> int:
    """Return the largest sum of neighbours 2i and 2i + 1 with equal sign, in int8 [out, in]."""
    wide = rows.astype(np.int16)
    if wide.shape[1] % 2:
        wide = np.pad(wide, ((0, 0), (0, 1)))
    first, second = wide[:, ::2], wide[:, 1::2]
    positive = np.maximum(first, 0) + np.maximum(second, 0)
    negative = np.minimum(first, 0) + np.minimum(second, 0)
    return int(max(positive.max(initial=0), -negative.min(initial=0)))
