"""A small writer of ONNX graphs whose weights lie in weights.bin."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper

from var_deploy.bundle.operators import OPSET as OPSET
from var_deploy.config import GraphForm
from var_deploy.export.int8.operators import dynamic_linear
from var_deploy.manifest import TensorInfo

IR_VERSION = 9

Shape = Sequence[int | str]
ReadKey = Callable[[str], NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of weights.bin and the function that makes it from checkpoint tensors.

    `make` gets a function that reads a checkpoint tensor by key and returns an array of `shape`;
    the writer casts it to `dtype`. MatMul weights are stored as [in, out].
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[ReadKey], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def onnx_type(dtype: DTypeLike) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class GraphBuilder:
    """Collects the nodes of one graph; values are referred to by name.

    In fp16 graphs products run on fp16 weights between casts. In int8 graphs `linear` quantises its
    input and returns fp32. The code that builds a graph is therefore the same in every precision.

    `linear` takes [..., G, in] and quantises each of the form's B images by itself.
    """

    def __init__(self, name: str, form: GraphForm) -> None:
        self.name, self.form = name, form
        self.half = form.precision == "fp16"
        self.rounded = form.precision == "int8"
        self.compute = np.dtype(np.float16 if self.half else np.float32)
        self.weights: dict[str, Weight] = {}
        self.inputs: list[TensorInfo] = []
        self.outputs: list[TensorInfo] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._scope: list[str] = []
        self._counter = 0

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes made inside, so that a message can name the layer."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        self.inputs.append(TensorInfo(name=name, dtype=np.dtype(dtype).name, shape=tuple(shape)))
        return name

    def output(self, name: str, dtype: DTypeLike, shape: Shape) -> None:
        """Declare a value, already made under this name, as a graph output."""
        self.outputs.append(TensorInfo(name=name, dtype=np.dtype(dtype).name, shape=tuple(shape)))

    def ops(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: int,
        outs: Sequence[str | None] = (),
        **attrs: Any,
    ) -> list[str]:
        """Add a node with several outputs, which have the names in `outs` that are not None."""
        node_name = self._fresh(op_type)
        wanted = [*outs, *[None] * (outputs - len(outs))]
        results = [out or f"{node_name}:{i}" for i, out in enumerate(wanted)]
        self._nodes.append(helper.make_node(op_type, list(inputs), results, node_name, **attrs))
        return results

    def op(self, op_type: str, *inputs: str, out: str | None = None, **attrs: Any) -> str:
        """Add a node with one output, named `out` if given; return the output's name."""
        node_name = self._fresh(op_type)
        result = out or f"{node_name}:0"
        self._nodes.append(helper.make_node(op_type, list(inputs), [result], node_name, **attrs))
        return result

    def constant(self, value: Any, dtype: DTypeLike | None = None) -> str:
        """Add a small constant that stays inside the ONNX file; equal constants are stored once."""
        array = np.asarray(value, dtype)
        content = f"{array.dtype.str}{array.shape}".encode() + array.tobytes()
        name = f"constant.{hashlib.sha256(content).hexdigest()[:12]}"
        if name not in self._constants:
            self._constants[name] = helper.make_tensor(
                name, onnx_type(array.dtype), array.shape, array.tobytes(), raw=True
            )
        return name

    def ints(self, *values: int) -> str:
        """Add an int64 vector, the form of shapes and axes."""
        return self.constant(values, np.int64)

    def weight(
        self,
        name: str,
        shape: Sequence[int],
        make: Callable[[ReadKey], NDArray[Any]] | None = None,
        dtype: DTypeLike = np.float32,
    ) -> str:
        """Add a tensor of weights.bin; by default it is the checkpoint's tensor of the same
        name."""

        def read_as_is(read: ReadKey) -> NDArray[Any]:
            return read(name).reshape(shape)

        self.weights[name] = Weight(
            name=name, shape=tuple(shape), dtype=np.dtype(dtype), make=make or read_as_is
        )
        return name

    def cast(self, value: str, dtype: DTypeLike, out: str | None = None) -> str:
        return self.op("Cast", value, to=onnx_type(dtype), out=out)

    def to_compute(self, value: str, out: str | None = None) -> str:
        """Cast fp32 to the type that products run in; `out` names the result where there is a
        cast."""
        return self.cast(value, np.float16, out) if self.half else value

    def to_float(self, value: str) -> str:
        """Cast from the type that products run in to fp32."""
        return self.cast(value, np.float32) if self.half else value

    def linear(
        self,
        x: str,
        key: str,
        width_in: int,
        width_out: int,
        bias: str | None,
        full: bool = False,
        rows: Callable[[NDArray[Any]], NDArray[Any]] = lambda weight: weight,
    ) -> str:
        """x [..., in] → [..., out] with the checkpoint's `key` [out, in], in the compute type.

        `bias` names a weight made with the compute type; `full` keeps the product in fp32 where
        the model asks for it; `rows` changes the rows of the checkpoint's matrix.
        """

        def matrix(read: ReadKey) -> NDArray[Any]:
            return rows(read(key))

        if self.rounded and not full:
            y = dynamic_linear(self, x, key, matrix, width_in, width_out)
        else:
            dtype = np.dtype(np.float32) if full else self.compute
            name = self.weight(key, (width_in, width_out), lambda read: matrix(read).T, dtype)
            y = self.op("MatMul", x, name)
        return self.op("Add", y, bias) if bias else y

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.ints(*shape))

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def split(
        self, x: str, axis: int, sizes: Sequence[int], outs: Sequence[str | None] = ()
    ) -> list[str]:
        return self.ops("Split", (x, self.ints(*sizes)), len(sizes), outs, axis=axis)

    def gather_row(self, table: str, index: int) -> str:
        """Return table[index] along the first axis, which is dropped."""
        return self.op("Gather", table, self.constant(index, np.int64), axis=0)

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def model(self, locate: Callable[[str], tuple[str, int, int]]) -> onnx.ModelProto:
        """Return the finished ONNX model; `locate` gives (file, offset, length) of a weight by
        name."""
        initializers = list(self._constants.values())
        for weight in self.weights.values():
            tensor = TensorProto(
                name=weight.name, data_type=onnx_type(weight.dtype), dims=weight.shape
            )
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in zip(
                ("location", "offset", "length"), locate(weight.name), strict=True
            ):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
        graph = helper.make_graph(
            self._nodes, self.name, _values(self.inputs), _values(self.outputs), initializers
        )
        return helper.make_model(
            graph,
            ir_version=IR_VERSION,
            producer_name="var-deploy",
            opset_imports=[helper.make_opsetid("", OPSET)],
        )

    def _fresh(self, op_type: str) -> str:
        self._counter += 1
        return "/".join([*self._scope, f"{op_type}_{self._counter}"])


def _values(tensors: Sequence[TensorInfo]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(t.name, onnx_type(t.dtype), t.shape) for t in tensors]
