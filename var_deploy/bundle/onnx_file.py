"""Checks an ONNX file without the package onnx, before an inference library reads it.

Only files in the form that the exporter writes pass: known operators of one opset, no functions, no
graphs inside of nodes, all weights in weights.bin, within its size. Everything else in the format
is refused by name, whether or not an inference library would accept it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from var_deploy import names
from var_deploy.bundle.interfaces import Tensor
from var_deploy.bundle.json_values import shown
from var_deploy.bundle.operators import OPERATORS, OPSET
from var_deploy.errors import BundleError

MAX_BYTES = 64 << 20  # bytes of a graph without weights; released models' have 0.5 MiB
MAX_TENSOR_BYTES = 1 << 40
MAX_DIMS = 8

# numbers of onnx.TensorProto.DataType → name and bytes of the types that are written
TYPES = {
    1: ("float32", 4),
    2: ("uint8", 1),
    3: ("int8", 1),
    6: ("int32", 4),
    7: ("int64", 8),
    9: ("bool", 1),
    10: ("float16", 2),
}
# Field numbers of the messages of onnx.proto, as far as they are written here or say nothing.
MODEL = {1: "ir_version", **dict.fromkeys((2, 3, 4, 5, 6), "words"), 7: "graph", 8: "opset"}
GRAPH = {1: "node", 2: "name", 5: "initializer", 10: "words", 11: "input", 12: "output"}
NODE = {1: "input", 2: "output", 3: "name", 4: "op_type", 5: "attribute", 7: "domain"}
ATTRIBUTE = {1: "name", 2: "f", 3: "i", 4: "s", 7: "floats", 8: "ints", 20: "type"}
TENSOR = {1: "dims", 2: "data_type", 8: "name", 9: "raw_data", 13: "external", 14: "location"}
ENTRY = {1: "key", 2: "value"}
VALUE, KIND = {1: "name", 2: "type"}, {1: "tensor"}
TENSOR_TYPE, SHAPE, DIMENSION = {1: "type", 2: "shape"}, {1: "dim"}, {1: "size", 2: "symbol"}
OPSET_ID = {1: "domain", 2: "version"}
# where weights.bin is named: graph, initializer, external data, value
_LOCATION = (7, 5, 13, 2)

Bytes = memoryview
Field = tuple[str, "int | Bytes"]


class _NotWrittenError(Exception):
    """The bytes are not in the form that the exporter writes."""


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """Inputs and outputs that a graph declares, as name, NumPy dtype and shape."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def inspect_onnx(data: bytes, weights_size: int) -> OnnxFile:
    """Check the bytes of an ONNX file whose weights lie in a weights.bin of the given size.

    Returns its inputs and outputs. Raises BundleError for every form that the exporter does not
    write.
    """
    if len(data) > MAX_BYTES:
        raise BundleError(f"it has {len(data)} bytes, at most {MAX_BYTES} are expected")
    try:
        return _model(memoryview(data), weights_size)
    except _NotWrittenError as error:
        raise BundleError(str(error)) from None
    except (IndexError, UnicodeDecodeError):
        raise BundleError("it is not an ONNX file, or is cut short") from None


def relocate(data: bytes, location: str) -> bytes:
    """Return the file with `location` in place of weights.bin as the place of its weights.

    `data` has passed `inspect_onnx`.
    """
    return _relocate(memoryview(data), _LOCATION, location.encode())


def _model(data: Bytes, weights_size: int) -> OnnxFile:
    graphs, opsets = list[Bytes](), list[tuple[str, int]]()
    for name, value in _fields(data, MODEL, "the model"):
        if name == "graph":
            graphs.append(_bytes(value))
        elif name == "opset":
            opset = dict(_fields(_bytes(value), OPSET_ID, "an opset"))
            opsets.append((_text(opset.get("domain", Bytes(b""))), _int(opset.get("version", 0))))
    if opsets != [("", OPSET)]:
        found = ", ".join(f"{domain or 'ONNX'} {version}" for domain, version in opsets[:4])
        raise _NotWrittenError(f"it uses operators of {shown(found)}, expected ONNX {OPSET} alone")
    if len(graphs) != 1:
        raise _NotWrittenError(f"it holds {len(graphs)} graphs, expected one")
    inputs, outputs = list[Tensor](), list[Tensor]()
    for name, value in _fields(graphs[0], GRAPH, "the graph"):
        if name == "node":
            _node(_bytes(value))
        elif name == "initializer":
            _initializer(_bytes(value), weights_size)
        elif name == "input":
            inputs.append(_declared(_bytes(value)))
        elif name == "output":
            outputs.append(_declared(_bytes(value)))
    return OnnxFile(inputs=tuple(inputs), outputs=tuple(outputs))


def _node(data: Bytes) -> None:
    operator = domain = b""
    for name, value in _fields(data, NODE, "a node"):
        if name == "op_type":
            operator = bytes(_bytes(value))
        elif name == "domain":
            domain = bytes(_bytes(value))
        elif name == "attribute":
            for _ in _fields(_bytes(value), ATTRIBUTE, "an attribute"):
                pass
    written = operator.decode("utf-8", "replace")
    if domain or written not in OPERATORS:
        full = f"{domain.decode('utf-8', 'replace')}.{written}" if domain else written
        raise _NotWrittenError(
            f"it has the operator {shown(full)}, which var-deploy does not write"
        )


def _initializer(data: Bytes, weights_size: int) -> None:
    dims, kind, raw, external, outside, name = list[int](), 0, None, list[Bytes](), 0, ""
    for field, value in _fields(data, TENSOR, "a tensor"):
        if field == "dims":
            dims += [value] if isinstance(value, int) else _packed(value)
        elif field == "data_type":
            kind = _int(value)
        elif field == "raw_data":
            raw = _bytes(value)
        elif field == "external":
            external.append(_bytes(value))
        elif field == "location":
            outside = _int(value)
        else:
            name = _text(value)
    if kind not in TYPES:
        raise _NotWrittenError(
            f"tensor {shown(name)} has the type {kind}, which var-deploy does not write"
        )
    good = len(dims) <= MAX_DIMS and all(0 <= n <= MAX_TENSOR_BYTES for n in dims)
    size = math.prod(dims) * TYPES[kind][1] if good else -1
    if not 0 <= size <= MAX_TENSOR_BYTES:
        raise _NotWrittenError(f"tensor {shown(name)} has the shape {shown(dims)}")
    if not external and not outside:
        if raw is None or len(raw) != size:
            found = "no" if raw is None else len(raw)
            raise _NotWrittenError(f"tensor {shown(name)} has {found} bytes, expected {size}")
        return
    entries = [dict(_fields(entry, ENTRY, "external data")) for entry in external]
    where = {_text(e.get("key", Bytes(b""))): _text(e.get("value", Bytes(b""))) for e in entries}
    if outside != 1 or raw is not None or len(where) != len(external):
        raise _NotWrittenError(f"tensor {shown(name)} lies in more than one place")
    if where.pop("location", None) != names.WEIGHTS:
        raise _NotWrittenError(f"tensor {shown(name)} does not lie in {names.WEIGHTS}")
    offset, length = (_decimal(where.pop(key, "")) for key in ("offset", "length"))
    if where or offset < 0 or length != size or offset + length > weights_size:
        raise _NotWrittenError(
            f"tensor {shown(name)} is {length} bytes at {offset} of {names.WEIGHTS}, expected "
            f"{size} within its {weights_size}"
        )


def _declared(data: Bytes) -> Tensor:
    """Parse an input or output of a graph."""
    value = _single(data, VALUE, "an input or output")
    name = _text(value.get("name", Bytes(b"")))
    kind = _single(_bytes(value.get("type", Bytes(b""))), KIND, f"the type of {shown(name)}")
    tensor = _single(_bytes(kind.get("tensor", Bytes(b""))), TENSOR_TYPE, f"{shown(name)}")
    element = _int(tensor.get("type", 0))
    if element not in TYPES or "shape" not in tensor:
        raise _NotWrittenError(f"{shown(name)} has no type or no shape that is written")
    shape = list[int | str]()
    for _, dimension in _fields(_bytes(tensor["shape"]), SHAPE, "a shape"):
        size = _single(_bytes(dimension), DIMENSION, "a size")
        symbol = size.get("symbol")
        shape.append(_int(size.get("size", 0)) if symbol is None else _text(symbol))
    return name, TYPES[element][0], tuple(shape)


def _single(data: Bytes, known: dict[int, str], what: str) -> dict[str, int | Bytes]:
    """Return the fields of a message, each of which may occur once."""
    fields = list(_fields(data, known, what))
    if len(dict(fields)) != len(fields):
        raise _NotWrittenError(f"{what} has a part twice")
    return dict(fields)


def _fields(data: Bytes, known: dict[int, str], what: str) -> Iterator[Field]:
    """Yield number and value of a message's fields: a whole number, or bytes."""
    position, end = 0, len(data)
    while position < end:
        key = data[position]
        position += 1
        if key > 127:
            key, position = _varint(data, position - 1)
        kind = key & 7
        if kind == 2:
            size = data[position]
            position += 1
            if size > 127:
                size, position = _varint(data, position - 1)
            value: int | Bytes = data[position : position + size]
            position += size
        elif kind == 0:
            number = data[position]
            position += 1
            if number > 127:
                number, position = _varint(data, position - 1)
            value = number - (1 << 64) if number >> 63 else number
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value = data[position : position + size]
            position += size
        else:
            raise IndexError
        if position > end:
            raise IndexError
        if key >> 3 not in known:
            raise _NotWrittenError(
                f"{what} has the field {key >> 3} of ONNX, which var-deploy does not write"
            )
        yield known[key >> 3], value


def _varint(data: Bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            if value >> 64:
                raise IndexError
            return value, position
        if shift > 63:
            raise IndexError


def _packed(data: Bytes) -> Sequence[int]:
    values, position = list[int](), 0
    while position < len(data):
        number, position = _varint(data, position)
        values.append(number - (1 << 64) if number >> 63 else number)
    return values


def _bytes(value: int | Bytes) -> Bytes:
    if isinstance(value, int):
        raise IndexError
    return value


def _int(value: int | Bytes) -> int:
    if not isinstance(value, int):
        raise IndexError
    return value


def _text(value: int | Bytes) -> str:
    return bytes(_bytes(value)).decode("utf-8")


def _decimal(text: str) -> int:
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else -1


def _relocate(data: Bytes, path: tuple[int, ...], location: bytes) -> bytes:
    if not path:
        return location if data == names.WEIGHTS.encode() else bytes(data)
    pieces, position, copied = list[bytes | Bytes](), 0, 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            position = _varint(data, position)[1]
            continue
        if kind != 2:
            position += 8 if kind == 1 else 4
            continue
        size, position = _varint(data, position)
        if key >> 3 == path[0]:
            inner = _relocate(data[position : position + size], path[1:], location)
            pieces += [data[copied:start], _encoded(key), _encoded(len(inner)), inner]
            copied = position + size
        position += size
    return b"".join([*pieces, data[copied:]])


def _encoded(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
