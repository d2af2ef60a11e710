"""The names that a pickle of a PyTorch checkpoint may use: tensors, storages, plain containers.

Tensors are described here, not built. A name that is not known to be data is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MAX_DIMENSIONS = 8
MAX_NUMBER = 2**62  # of sizes, strides and offsets

# storage classes by the names that pickles give them
STORAGE_TYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
DTYPES: Mapping[str, torch.dtype] = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
# names that are accepted because they hold settings, not weights; their content is skipped
OTHER_NAMES = frozenset(
    {
        *UNTYPED,
        *PLAIN_TENSORS,
        "torch.serialization._get_layout",
        "torch.device",
        "torch.per_tensor_affine",
        "torch.per_tensor_symmetric",
        "torch.per_channel_affine",
        "torch.per_channel_symmetric",
        "torch.per_channel_affine_float_qparams",
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.set",
        "builtins.complex",
        "__builtin__.bytearray",
        "__builtin__.set",
        "__builtin__.complex",
    }
)


class BadFileError(Exception):
    """The bytes are not in the format that torch.save writes; the message says what was found."""


class RefusedFileError(BadFileError):
    """The bytes may be valid but are not accepted; the message says why and what helps."""


class ForbiddenNameError(Exception):
    """The pickle asks for an import or a call; the message is the name that it asks for."""


@dataclass(frozen=True)
class PickledStorage:
    """Name and size of the bytes that a tensor lies in.

    Attributes:
        dtype: None for an untyped storage, whose `length` is in bytes.
        length: number of elements.
        first: first element in the record of that name.
    """

    key: str
    dtype: torch.dtype | None
    length: int
    first: int = 0


@dataclass(frozen=True)
class PickledTensor:
    """A pickle's description of a tensor; only that its sizes are whole numbers is checked.

    Attributes:
        offset, stride: in elements.
        kind: "" for an ordinary tensor, else such as "sparse"; then the rest may be empty.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None
    storage: PickledStorage | None = None
    kind: str = ""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    name: str


def find_name(name: str) -> Name | torch.dtype:
    """Look up a name of the pickle. Raises ForbiddenNameError for a name not known to be data."""
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.cuda") and last in STORAGE_TYPES:
        return Name(last)
    if module == "torch" and last in DTYPES:
        return DTYPES[last]
    known = name in TENSORS or name in OTHER_NAMES or name in CONTAINERS
    if not known:
        raise ForbiddenNameError(name)
    return Name(name)


def find_storage(pid: object) -> PickledStorage:
    """Read a storage reference: ("storage", class, key, device, length), in old files followed by
    (view key, first, length)."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise BadFileError("a reference to something else than a storage")
    _, kind, key, _, length, *view = pid
    if isinstance(kind, Name) and (kind.name in STORAGE_TYPES or kind.name in UNTYPED):
        dtype = STORAGE_TYPES.get(kind.name)
    else:
        raise BadFileError("a storage of no type")
    if not isinstance(key, str) or not _is_size(length):
        raise BadFileError("a storage without a name or a size")
    if not view or view[0] is None:
        return PickledStorage(key, dtype, length)
    if not isinstance(view[0], tuple) or len(view[0]) != 3 or not all(map(_is_size, view[0][1:])):
        raise BadFileError("a view of a storage without a size")
    _, first, length = view[0]
    return PickledStorage(key, dtype, length, first)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS or not all(map(_is_size, value)):
        raise BadFileError("a tensor whose sizes are not a few whole numbers")
    return value


def _dense(storage: object, offset: object, size: object, stride: object, *rest: object) -> Any:
    """Describe a tensor of a typed storage; `rest` is requires_grad, hooks and perhaps pending
    operations."""
    if len(rest) > 3:
        raise TypeError
    return _strided(storage, offset, size, stride, rest[2] if len(rest) == 3 else None, None)


def _dense_untyped(
    storage: object, offset: object, size: object, stride: object,
    requires_grad: object, hooks: object, dtype: object, metadata: object = None,
) -> Any:  # fmt: skip
    if not isinstance(dtype, torch.dtype):
        raise BadFileError("a tensor of no type")
    return _strided(storage, offset, size, stride, metadata, dtype)


def _strided(
    storage: object, offset: object, size: object, stride: object,
    metadata: object, dtype: torch.dtype | None,
) -> PickledTensor:  # fmt: skip
    if not isinstance(storage, PickledStorage) or not _is_size(offset):
        raise BadFileError("a tensor without a storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise BadFileError("a tensor of no type")
    shape, steps = _sizes(size), _sizes(stride)
    if len(shape) != len(steps):
        raise BadFileError(f"a tensor of {len(shape)} dimensions with {len(steps)} strides")
    assert isinstance(offset, int)
    kind = "lazily conjugated or negated" if metadata else ""
    return PickledTensor(shape, steps, offset, dtype, storage, kind)


def _parameter(data: object, *_: object) -> PickledTensor:
    if not isinstance(data, PickledTensor):
        raise BadFileError("a parameter without a tensor")
    return data


def _sparse(layout: object, data: tuple[Any, ...]) -> PickledTensor:
    """Describe a sparse tensor; `data` is such as (indices, values, size, is_coalesced)."""
    parts = data[:5] if isinstance(data, tuple) else ()
    sizes = [part for part in parts if isinstance(part, tuple)]
    return PickledTensor(_sizes(sizes[0]) if sizes else (), kind="sparse")


def _quantized(storage: object, offset: object, size: object, *_: object) -> PickledTensor:
    return PickledTensor(_sizes(size), kind="quantized")


def _meta(dtype: object, size: object, *_: object) -> PickledTensor:
    return PickledTensor(_sizes(size), kind="meta")


def _of_kind(kind: str) -> Callable[..., PickledTensor]:
    return lambda *_: PickledTensor((), kind=kind)


# The functions that rebuild tensors, and what stands for each
TENSORS: Mapping[str, Callable[..., PickledTensor]] = {
    "torch._utils._rebuild_tensor": _dense,
    "torch._utils._rebuild_tensor_v2": _dense,
    "torch._utils._rebuild_tensor_v3": _dense_untyped,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_nested_tensor": _of_kind("nested"),
    "torch._utils._rebuild_wrapper_subclass": _of_kind("wrapped"),
    "torch._utils._rebuild_device_tensor_from_numpy": _of_kind("device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _of_kind("device"),
}
CONTAINERS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "torch.Size",
        WITH_ATTRIBUTES,
    }
)
