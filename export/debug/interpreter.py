"""Runs an exported graph node by node with PyTorch, in the number formats that the graph names.

ONNX Runtime has no fp16 arithmetic on a CPU: it computes fp16 graphs in fp32 and rounds where it
must, which hides what fp16 does to a model. Here every fp16 value is rounded to fp16, and a value
beyond its range becomes infinite; a product takes fp16 numbers, adds up in fp32 and is rounded
once, as tensor cores do.

Little is held: a value until its last use, a weight while the node that uses it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from var_deploy.errors import ExportError, one_line

OnValue = Callable[[str, str, Tensor], None]  # node name, value name, value
Attributes = Mapping[str, Any]
Operator = Callable[..., "Tensor | list[Tensor]"]

TORCH_TYPES = {
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.bool_): torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class _External:
    """The place of a weight in weights.bin."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        """Return the weight, mapped; the mapping is released with the tensor."""
        # copy on write, because PyTorch warns of memory that it may not write to
        return torch.from_numpy(
            np.memmap(self.file, self.dtype, mode="c", offset=self.offset, shape=self.shape)
        )


class TorchGraph:
    """An ONNX file of a bundle, ready to be interpreted.

    Attributes:
        nodes: its nodes, in order.

    Raises ExportError for an operator that is not among `OPERATORS`.
    """

    def __init__(self, path: Path) -> None:
        model = onnx.load(str(path), load_external_data=False)
        self.name = path.stem
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self._attributes = [_attributes(node) for node in self.nodes]
        self._inputs = {v.name: _dtype(v.type.tensor_type.elem_type) for v in model.graph.input}
        self._outputs = [v.name for v in model.graph.output]
        self._constants: dict[str, Tensor | _External] = {
            t.name: _initializer(t, path.parent) for t in model.graph.initializer
        }
        self._last_use = {name: i for i, node in enumerate(self.nodes) for name in node.input}
        for node in self.nodes:
            if node.op_type not in OPERATORS or node.domain:
                raise ExportError(f"{self.name}: no arithmetic is known for {_title(node)}")

    def maker(self, value: str) -> onnx.NodeProto:
        """Return the node that computes a value."""
        return next(node for node in self.nodes if value in node.output)

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        also: Collection[str] = (),
        on_value: OnValue | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Compute the graph; return all outputs, and the interior values named in `also`, by name.

        Inputs that the graph does not take are ignored. `on_value` sees every value as it is made.
        Raises ExportError naming the node that cannot be computed.
        """
        kept = {*self._outputs, *also}
        values = {name: _tensor(inputs[name], dtype) for name, dtype in self._inputs.items()}
        with torch.inference_mode():
            for number, (node, attributes) in enumerate(
                zip(self.nodes, self._attributes, strict=True)
            ):
                operands = [self._value(values, name) for name in node.input]
                try:
                    results = _compute(node.op_type, attributes, operands)
                except (RuntimeError, IndexError) as error:
                    why = one_line(error)
                    raise ExportError(f"{self.name}: {_title(node)} failed: {why}") from error
                values.update(zip(node.output, results, strict=True))
                del operands, results
                if on_value:
                    for name in node.output:
                        on_value(node.name, name, values[name])
                for name in {*node.input, *node.output}:
                    if self._last_use.get(name, number) <= number and name not in kept:
                        values.pop(name, None)
        return {name: values[name].numpy() for name in kept}

    def _value(self, values: Mapping[str, Tensor], name: str) -> Tensor | None:
        if not name:  # an optional input that is left out
            return None
        if name in values:
            return values[name]
        constant = self._constants[name]
        return constant.read() if isinstance(constant, _External) else constant


def _compute(op: str, attributes: Attributes, operands: list[Tensor | None]) -> list[Tensor]:
    """Compute one node; arithmetic on fp16 is done in fp32 and rounded."""
    half = op not in MOVES and any(x is not None and x.dtype == torch.float16 for x in operands)
    if half:
        operands = [
            x.float() if x is not None and x.dtype == torch.float16 else x for x in operands
        ]
    result = OPERATORS[op](attributes, *operands)
    results = result if isinstance(result, list) else [result]
    return [x.half() if x.dtype == torch.float32 else x for x in results] if half else results


def _title(node: onnx.NodeProto) -> str:
    return f"{node.name} ({node.op_type})"


def _attributes(node: onnx.NodeProto) -> Attributes:
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def _dtype(elem_type: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))


def _initializer(tensor: onnx.TensorProto, folder: Path) -> Tensor | _External:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
    place = {entry.key: entry.value for entry in tensor.external_data}
    return _External(
        file=folder / place["location"],
        dtype=_dtype(tensor.data_type),
        shape=tuple(tensor.dims),
        offset=int(place["offset"]),
    )


def _tensor(value: Any, dtype: np.dtype[Any]) -> Tensor:
    array = np.asarray(value, dtype, order="C")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


# --- the operators of our graphs, as ONNX defines them (opset 20)


def _axes(axes: Tensor) -> list[int]:
    return [int(i) for i in axes.tolist()]


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def apply(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
        return function(x, dim=_axes(axes), keepdim=bool(a.get("keepdims", 1)))

    return apply


def _cast(a: Attributes, x: Tensor) -> Tensor:
    return x.to(TORCH_TYPES[_dtype(a["to"])])


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = x.ndim - 2
    before, after = a["pads"][:axes], a["pads"][axes:]
    if before != after:
        x, before = F.pad(x, _far_first(before, after)), [0] * axes
    convolve = F.conv1d if axes == 1 else F.conv2d
    return convolve(x, weight, bias, stride=a.get("strides", [1] * axes), padding=before)


def _expand(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, _axes(shape)))


def _gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    return x[(slice(None),) * (a.get("axis", 0) % x.ndim) + (indices,)]


def _instance_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.group_norm(x, x.shape[1], scale, bias, a["epsilon"])


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, tuple(scale.shape), scale, bias, a["epsilon"])


def _pad(a: Attributes, x: Tensor, pads: Tensor, value: Tensor) -> Tensor:
    before, after = pads.view(2, -1).tolist()
    return F.pad(x, _far_first(before, after), value=value.item())


def _far_first(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return padding in PyTorch's form: pairs, from the last axis on."""
    return [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(_axes(shape))])


def _resize(a: Attributes, x: Tensor, region: None, scales: Tensor) -> Tensor:
    """Resize by nearest neighbour and whole factors: index = floor(i / factor)."""
    return F.interpolate(x, scale_factor=scales.tolist()[2:], mode="nearest")


def _slice(a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor) -> Tensor:
    for start, end, axis in zip(_axes(starts), _axes(ends), _axes(axes), strict=True):
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end),)]
    return x


def _squeeze(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    return x.squeeze(tuple(_axes(axes)))


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(i % rank for i in _axes(axes)):
        x = x.unsqueeze(axis)
    return x


OPERATORS: dict[str, Operator] = {
    "Add": lambda a, x, y: x + y,
    "And": lambda a, x, y: x & y,
    "ArgMin": lambda a, x: x.argmin(a["axis"], keepdim=bool(a.get("keepdims", 1))),
    "Cast": _cast,
    "Clip": lambda a, x, low, high: x.clamp(low, high),
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Conv": _conv,
    "Div": lambda a, x, y: x / y,
    "Equal": lambda a, x, y: x == y,
    "Exp": lambda a, x: x.exp(),
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")),
    "Greater": lambda a, x, y: x > y,
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "Identity": lambda a, x: x,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LessOrEqual": lambda a, x, y: x <= y,
    "MatMul": lambda a, x, y: x @ y,
    "Max": lambda a, *operands: reduce(torch.maximum, operands),
    "Min": lambda a, *operands: reduce(torch.minimum, operands),
    "Mul": lambda a, x, y: x * y,
    "Or": lambda a, x, y: x | y,
    "Pad": _pad,
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda x, **how: x.square().sum(**how)),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Split": lambda a, x, sizes: list(x.split(_axes(sizes), a.get("axis", 0))),
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda a, x, y: x - y,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
    "Where": lambda a, condition, x, y: torch.where(condition, x, y),
}
# These hand values on as they are, in any number format.
MOVES = {
    *("Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze", "Where"),
}
