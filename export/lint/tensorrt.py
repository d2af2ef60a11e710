"""Checks that TensorRT 10.3 accepts a graph, from the ONNX file alone.

10.3 is the oldest TensorRT that is supported (JetPack 6.2). It parses opset 9 to 20 in the default
domain; what its parser learned later, or changed, is listed at the rules (onnx-tensorrt's
docs/operators.md and docs/Changelog.md). Engines are strongly typed: a number format comes from the
graph alone, so the rules also say which values must be fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from var_deploy import names
from var_deploy.bundle.graph_refs import GraphRef
from var_deploy.bundle.operators import FLOAT_OPERATORS

OPSETS = range(9, 21)
MAX_IR_VERSION = 10  # IR version of ONNX 1.16, with which 10.3 is built

HALF, FLOAT, BOOL = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BOOL
TYPES = {HALF, FLOAT, TensorProto.INT32, TensorProto.INT64, BOOL}

# Operators that are missing from the list, with the reason.
REFUSED = {
    "Attention": "it exists from 10.14 on",
    "CumSum": "it becomes a loop before 10.8",
    "GroupNormalization": "its meaning changed between opsets 18 and 21",
    "If": "it holds a graph of its own",
    "Loop": "it holds a graph of its own",
    "Multinomial": "it is not parsed",
    "NonZero": "the shape of its result depends on the data",
    "RandomUniform": "its seed is ignored",
    "RandomUniformLike": "its seed is ignored",
    "Scan": "it holds a graph of its own",
    "TopK": "it takes k up to 3840",
}

# Inputs, by position, that must be constants of the file.
CONSTANT_INPUTS = {
    "InstanceNormalization": (1, 2),
    **{f"Reduce{kind}": (1,) for kind in ("L2", "Max", "Min", "Sum", "SumSquare")},
    "Unsqueeze": (1,),  # computed axes are parsed from 10.7 on
}
# Attributes with the values that 10.3 takes; the first one is the default.
ATTRIBUTES: dict[str, dict[str, tuple[object, ...]]] = {
    "Pad": {"mode": (b"constant", b"reflect", b"edge")},
    "Resize": {
        "mode": (b"nearest", b"linear"),
        "coordinate_transformation_mode": (
            *(b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn", b"asymmetric"),
            b"align_corners",
        ),
        "nearest_mode": (b"round_prefer_floor", b"round_prefer_ceil", b"floor", b"ceil"),
        "keep_aspect_ratio_policy": (b"stretch",),
        "antialias": (0,),
    },
}

# fp16 is for products, what is added to them, and what only hands values on.
HALF_OPERATORS = {
    *("MatMul", "Conv", "Gelu", "Cast"),
    *("Concat", "Expand", "Gather", "Identity", "Reshape", "Shape", "Split", "Transpose", "Where"),
}
HALF_WITH_CONSTANT = {"Add", "Mul"}  # a bias, a factor; the sums of the stream are fp32
# First parts of node names: here nothing is fp16 …
FULL_SCOPES = ("head", "sampler", "quantize", "next_input", "text_norm", "text_wo")
# … and here, in an fp16 graph, every product is.
PRODUCT_SCOPES = (
    *("blocks.", "decoder.", "encoder.", "post_quant_conv", "quant_conv"),
    *("head_nm.", "shared_ada_lin.", "text_blocks."),
)
# inputs and outputs that are fp16 as well
CACHE = tuple(
    name.partition(".")[0] + "."
    for name in (names.past_key(0), names.new_key(0), names.text_key(0))
)

Values = Mapping[str, Any]  # name → TypeProto.Tensor


def lint_file(path: Path, graph: GraphRef) -> list[str]:
    """Run `lint` on the file of a bundle's graph; only `step` may have symbolic sizes."""
    model = onnx.load(str(path), load_external_data=False)
    open_sizes = names.OPEN_SIZES
    return lint(model, graph.precision, open_sizes if graph.kind == "step" else ())


def lint(model: onnx.ModelProto, precision: str, symbols: Collection[str] = ()) -> list[str]:
    """Return what TensorRT 10.3 would refuse or compute differently, one line per problem, each
    naming the node.

    `symbols` are the sizes that may stay open; without any, every shape must be known.
    """
    problems = [*_format(model), *_names(model.graph), *_interface(model.graph, symbols)]
    if problems:  # the rest repeats them
        return problems
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    values = values_of(inferred.graph)
    constants = {t.name for t in model.graph.initializer}
    doubtful: set[str] = set()  # values that follow from a problem reported already
    for node in model.graph.node:
        found = list(_operator(node, constants, values))
        shapes = list(_shapes(node, values, bool(symbols)))
        if doubtful.isdisjoint(node.input):
            found = found or [*_types(node, values), *shapes]
            if not found and precision == "fp16":
                found = list(_half(node, constants, values))
        if found or shapes:
            doubtful.update(node.output)
        problems += [f"{node.name or node.output[0]}: {problem}" for problem in found]
    return problems + list(_number_formats(model.graph, values, precision))


def _format(model: onnx.ModelProto) -> Iterator[str]:
    """Check versions and sections of the file."""
    if model.ir_version > MAX_IR_VERSION:
        yield f"IR version {model.ir_version}, 10.3 reads up to {MAX_IR_VERSION}"
    for opset in model.opset_import:
        if opset.domain:
            yield f"operators of the domain {opset.domain!r}: only the default one is known"
        elif opset.version not in OPSETS:
            yield f"opset {opset.version}, 10.3 parses {OPSETS[0]} to {OPSETS[-1]}"
    if model.functions or model.graph.sparse_initializer:
        yield "functions or sparse weights, which are not used here"


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    inputs = {v.name for v in graph.input}
    constants = {t.name for t in graph.initializer}
    for name in (v.name for v in graph.output):
        if name in inputs:
            yield f"{name}: is an input and an output"
        elif name in constants:
            yield f"{name}: is a constant and an output"
    for name in sorted(inputs & constants):
        yield f"{name}: is an input with a default"


def _interface(graph: onnx.GraphProto, symbols: Collection[str]) -> Iterator[str]:
    """Check the declared inputs and outputs: known types, known sizes, nothing empty."""
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            if tensor.elem_type not in TYPES:
                yield f"{kind} {value.name}: type {_type(tensor.elem_type)} is not supported"
            if not tensor.HasField("shape"):
                yield f"{kind} {value.name}: has no shape"
            for size in tensor.shape.dim:
                if size.HasField("dim_value"):
                    if size.dim_value < 1:
                        yield f"{kind} {value.name}: has a size of {size.dim_value}"
                elif size.dim_param not in symbols:
                    found = size.dim_param or "unknown"
                    yield f"{kind} {value.name}: has the open size {found!r}"
    for constant in graph.initializer:
        if 0 in constant.dims:
            yield f"{constant.name}: is empty"


def _operator(node: onnx.NodeProto, constants: Collection[str], values: Values) -> Iterator[str]:
    """Check the operator, its attributes, and which inputs are constants."""
    if node.op_type not in FLOAT_OPERATORS or node.domain:
        why = REFUSED.get(node.op_type, "it is not on the list of those known to work")
        yield f"operator {node.op_type}: {why}"
        return
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    for name, known in ATTRIBUTES.get(node.op_type, {}).items():
        value = attributes.get(name, known[0])
        if value not in known:
            shown = value.decode() if isinstance(value, bytes) else value
            yield f"{node.op_type} with {name} {shown} is not parsed"
    for position in CONSTANT_INPUTS.get(node.op_type, ()):
        if position < len(node.input) and node.input[position] not in {*constants, ""}:
            yield f"{node.op_type}: input {node.input[position]} must be a constant"
    if node.op_type == "Pad" and len(node.input) > 3:
        yield "Pad with axes is parsed from 10.4 on"
    computed = node.op_type == "Conv" and node.input[1] not in constants
    if computed and "kernel_shape" not in attributes:
        # the parser's handling of such a weight's shape was fixed in 10.4
        yield "Conv with a computed weight must state its kernel_shape"


def _types(node: onnx.NodeProto, values: Values) -> Iterator[str]:
    """Check that every value has a type that TensorRT knows, and that operands agree.

    ONNX's own schemas say which: inputs and outputs of one type parameter, such as "T".
    """
    schema = onnx.defs.get_schema(node.op_type, OPSETS[-1], "")
    parameters: dict[str, tuple[str, int]] = {}
    for formal, operands in ((schema.inputs, node.input), (schema.outputs, node.output)):
        for position, name in enumerate(operands):
            if not name:
                continue
            if name not in values:
                continue
            kind = values[name].elem_type
            if kind not in TYPES:
                yield f"{name} is {_type(kind)}, which is not supported"
            parameter = formal[min(position, len(formal) - 1)].type_str
            first, expected = parameters.setdefault(parameter, (name, kind))
            if kind != expected:
                yield f"{first} is {_type(expected)} and {name} is {_type(kind)}"


def _shapes(node: onnx.NodeProto, values: Values, symbolic: bool) -> Iterator[str]:
    """Check the output shapes of a node: known in a static graph, empty nowhere."""
    for name in node.output:
        if name not in values:
            yield f"the type of {name} does not follow from the graph"
            continue
        tensor = values[name]
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        if 0 in sizes:
            yield f"{name} is empty"
        elif not symbolic and (None in sizes or not tensor.HasField("shape")):
            yield f"the shape of {name} is not known before it is run"


def _half(node: onnx.NodeProto, constants: Collection[str], values: Values) -> Iterator[str]:
    """Check the number formats of an fp16 graph: fp32 where it must be, fp16 where it should be."""
    used = [name for name in (*node.input, *node.output) if name]
    half = [name for name in used if values[name].elem_type == HALF]
    scope = node.name.partition("/")[0]
    full = scope.partition(".")[0] in FULL_SCOPES
    if half and full:
        yield f"{half[0]} is fp16; in {scope} everything must be fp32"
    elif half and node.op_type in HALF_WITH_CONSTANT:
        if not any(name in constants for name in node.input):
            yield f"{node.op_type} of two computed values runs in fp16, it must run in fp32"
    elif half and node.op_type not in HALF_OPERATORS:
        yield f"{node.op_type} runs in fp16, it must run in fp32"
    elif not half and node.op_type in ("MatMul", "Conv") and scope.startswith(PRODUCT_SCOPES):
        yield f"{node.op_type} runs in fp32, in an fp16 graph it should run in fp16"


def _number_formats(graph: onnx.GraphProto, values: Values, precision: str) -> Iterator[str]:
    """Check that fp16 outside a graph is the cache of an fp16 graph, and nothing else."""
    if precision == "fp32":
        for name in (name for name, value in values.items() if value.elem_type == HALF):
            yield f"{name}: is fp16 in an fp32 graph"
        return
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        expected = HALF if value.name.startswith(CACHE) else FLOAT
        if kind in (HALF, FLOAT) and kind != expected:
            yield f"{value.name}: is {_type(kind)}, expected {_type(expected)}"


def values_of(graph: onnx.GraphProto) -> dict[str, Any]:
    """Return type and shape of every value by name."""
    values = {}
    for constant in graph.initializer:
        values[constant.name] = helper.make_tensor_type_proto(
            constant.data_type, constant.dims
        ).tensor_type
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.elem_type:
            values[value.name] = value.type.tensor_type
    return values


def _type(elem_type: int) -> str:
    """Return a type's name: fp32 as the rest of the project writes it, else ONNX's name."""
    if elem_type in (HALF, FLOAT):
        return "fp16" if elem_type == HALF else "fp32"
    return str(TensorProto.DataType.Name(elem_type)).lower()
