"""Pickles of PyTorch checkpoints, read as data.

`torch.save` writes a pickle that names tensors, and beside it the bytes of their storages. This
reader turns the opcodes into dicts, lists, numbers and descriptions of tensors. Nothing that a
pickle names is imported or called, no tensor is made, and time and memory grow with the length of
the pickle alone: a pickle of a few bytes cannot ask for gigabytes or for ever.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MAX_OPCODES = 500_000  # a training checkpoint of the largest released model has about 50 000
STOP = 0x2E
MAX_DIMENSIONS = 8
MAX_ARGUMENTS = 9  # one more than any of the functions takes
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
# what else may be named because it holds settings, not weights; its content is left aside
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
    """The bytes are not what torch.save writes; the message says what was found."""


class RefusedFileError(BadFileError):
    """The bytes may be sound, and are not taken; the message says what was found and what helps."""


class ForbiddenNameError(Exception):
    """The pickle wants something imported or called; the message is its name."""


@dataclass(frozen=True)
class PickledStorage:
    """Name and size of the bytes of a tensor.

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
    """What a pickle says about a tensor: sizes are whole numbers, and nothing else is checked.

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
class _Name:
    """A class or function that the pickle names."""

    name: str


class _Opaque:
    """A value that holds no weights."""


_OPAQUE = _Opaque()
_MARK = object()


class PickleReader:
    """Reads one pickle after another from bytes, at most MAX_OPCODES opcodes in all.

    `position` is where the next pickle begins, `storages` are those named so far. Dicts have text
    as keys: numbers become their digits, and entries under any other key are left out.
    """

    def __init__(self, data: bytes) -> None:
        self.position = 0
        self.storages: list[PickledStorage] = []
        self._data = data
        self._left = MAX_OPCODES
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The next object. Raises BadFileError or ForbiddenNameError."""
        self._stack, self._memo = [], {}
        data, steps = self._data, _STEPS
        try:
            while True:
                code = data[self.position]
                self.position += 1
                self._left -= 1
                if code == STOP:
                    return self._pop()
                if self._left < 0:
                    self._spend(0)
                if code not in steps:
                    raise BadFileError(f"opcode {code:#04x} at byte {self.position - 1}")
                steps[code](self)
        except (IndexError, KeyError, UnicodeDecodeError) as error:
            raise BadFileError(f"{type(error).__name__} before byte {self.position}") from None

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise RefusedFileError(
                f"a pickle of more than {MAX_OPCODES} opcodes; save the state_dict() alone"
            )

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise BadFileError(f"the pickle ends after {len(self._data)} bytes")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise BadFileError(f"no line ends after byte {self.position}")
        return self._take(end + 1 - self.position)[:-1].decode()

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise BadFileError(f"nothing after a mark before byte {self.position}")
        return value

    def _top(self, kind: type) -> Any:
        value = self._stack[-1]
        if type(value) is not kind:
            raise BadFileError(f"{type(value).__name__} instead of {kind.__name__}")
        return value

    def _since_mark(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:  # IndexError below the lowest
            at -= 1
            if at < 0:
                raise BadFileError(f"no mark before byte {self.position}")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    # what opcodes do

    def push(self, value: object) -> None:
        self._stack.append(value)

    def push_number(self, form: str) -> None:
        self.push(self._number(form))

    def push_long(self) -> None:
        self.push(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def push_text(self, form: str) -> None:
        self.push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def push_bytes(self, form: str) -> None:
        self._take(self._number(form))
        self.push(_OPAQUE)

    def push_old_text(self, form: str) -> None:
        """The text type of Python 2."""
        self.push(self._take(self._number(form)).decode("latin-1"))

    def push_tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def push_marked(self, kind: type) -> None:
        items = self._since_mark()
        self.push(_OPAQUE if kind is frozenset else kind(items))

    def push_memo(self, form: str) -> None:
        self.push(self._memo[self._number(form)])

    def memoize(self, form: str = "") -> None:
        index = self._number(form) if form else len(self._memo)
        if self._stack[-1] is _MARK:
            raise BadFileError(f"a mark is stored before byte {self.position}")
        self._memo[index] = self._stack[-1]

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def append_marked(self) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        _set(self._top(dict), key, value)

    def set_marked(self) -> None:
        items = self._since_mark()
        target = self._top(dict)
        if len(items) % 2:
            raise BadFileError(f"a key without a value before byte {self.position}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(target, key, value)

    def add_marked(self) -> None:
        self._since_mark()
        self._top(_Opaque)

    def name_lines(self) -> None:
        self.push(_named(f"{self._line()}.{self._line()}"))

    def name_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise BadFileError(f"a name that is not text before byte {self.position}")
        self.push(_named(f"{module}.{name}"))

    def call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise BadFileError(f"a call of no function before byte {self.position}")
        self.push(self._called(function.name, arguments))

    def build(self) -> None:
        self._pop()  # attributes such as a state dict's versions
        if self._stack[-1] is _MARK or isinstance(self._stack[-1], _Name):
            raise BadFileError(f"attributes of nothing before byte {self.position}")

    def storage(self) -> None:
        self.storages.append(_storage(self._pop()))
        self.push(self.storages[-1])

    def _called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in ("collections.OrderedDict", "collections.Counter"):
            return self._dict(arguments)
        if name == "torch.Size":
            return arguments[0] if arguments else ()
        if name == WITH_ATTRIBUTES and len(arguments) == 4:
            function, kind, inner, _ = arguments
            if isinstance(kind, _Name) and kind.name not in PLAIN_TENSORS:
                raise ForbiddenNameError(kind.name)
            if isinstance(function, _Name) and isinstance(inner, tuple):
                name, arguments = function.name, inner
        if name not in _TENSORS:
            return _OPAQUE
        try:
            return _TENSORS[name](*arguments[:MAX_ARGUMENTS])
        except TypeError:
            raise BadFileError(f"{name.rpartition('.')[2]} with wrong arguments") from None

    def _dict(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Of nothing, of a dict, or as Python 2 wrote it, of pairs."""
        first = arguments[0] if arguments else ()
        if isinstance(first, dict):
            return first
        if not isinstance(first, (list, tuple)):
            raise BadFileError(f"a dict of {type(first).__name__}")
        self._spend(len(first))  # the same pairs can be named again and again
        made: dict[str, Any] = {}
        for pair in first:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise BadFileError("a dict of something else than pairs")
            _set(made, *pair)
        return made


def _set(target: dict[str, Any], key: object, value: object) -> None:
    """Numbers as keys are few in number or made to collide: digits do not."""
    if isinstance(key, str):
        target[key] = value
    elif isinstance(key, (int, float)) and abs(key) < MAX_NUMBER:
        target[str(key)] = value


def _named(name: str) -> _Name | torch.dtype:
    """Raises ForbiddenNameError for what is not known to be data."""
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.cuda") and last in STORAGE_TYPES:
        return _Name(last)
    if module == "torch" and last in DTYPES:
        return DTYPES[last]
    known = name in _TENSORS or name in OTHER_NAMES or name in _CONTAINERS
    if not known:
        raise ForbiddenNameError(name)
    return _Name(name)


def _storage(pid: object) -> PickledStorage:
    """("storage", class, key, device, length), then in old files (view key, first, length)."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise BadFileError("a reference to something else than a storage")
    _, kind, key, _, length, *view = pid
    if isinstance(kind, _Name) and (kind.name in STORAGE_TYPES or kind.name in UNTYPED):
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
    """Of a typed storage; `rest` is requires_grad, hooks and perhaps pending operations."""
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
    """`data` is such as (indices, values, size, is_coalesced)."""
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
_TENSORS: Mapping[str, Callable[..., PickledTensor]] = {
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
_CONTAINERS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "torch.Size",
        WITH_ATTRIBUTES,
    }
)

# The opcodes of protocols 2 to 5 in which data is written
_STEPS: Mapping[int, Callable[[PickleReader], object]] = {
    0x80: lambda m: m._take(1),  # PROTO
    0x95: lambda m: m._take(8),  # FRAME
    0x28: lambda m: m.push(_MARK),  # MARK
    0x30: lambda m: m._stack.pop(),  # POP
    0x31: lambda m: m._since_mark(),  # POP_MARK
    0x32: lambda m: m.push(m._stack[-1]),  # DUP
    0x4E: lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    0x4B: lambda m: m.push_number("<B"),  # BININT1
    0x4D: lambda m: m.push_number("<H"),  # BININT2
    0x4A: lambda m: m.push_number("<i"),  # BININT
    0x47: lambda m: m.push_number(">d"),  # BINFLOAT
    0x8A: PickleReader.push_long,  # LONG1
    0x8C: lambda m: m.push_text("<B"),  # SHORT_BINUNICODE
    0x58: lambda m: m.push_text("<I"),  # BINUNICODE
    0x8D: lambda m: m.push_text("<Q"),  # BINUNICODE8
    0x55: lambda m: m.push_old_text("<B"),  # SHORT_BINSTRING
    0x54: lambda m: m.push_old_text("<I"),  # BINSTRING
    0x43: lambda m: m.push_bytes("<B"),  # SHORT_BINBYTES
    0x42: lambda m: m.push_bytes("<I"),  # BINBYTES
    0x8E: lambda m: m.push_bytes("<Q"),  # BINBYTES8
    0x96: lambda m: m.push_bytes("<Q"),  # BYTEARRAY8
    0x29: lambda m: m.push(()),  # EMPTY_TUPLE
    0x85: lambda m: m.push_tuple(1),  # TUPLE1
    0x86: lambda m: m.push_tuple(2),  # TUPLE2
    0x87: lambda m: m.push_tuple(3),  # TUPLE3
    0x74: lambda m: m.push_marked(tuple),  # TUPLE
    0x5D: lambda m: m.push([]),  # EMPTY_LIST
    0x6C: lambda m: m.push_marked(list),  # LIST
    0x7D: lambda m: m.push({}),  # EMPTY_DICT
    0x8F: lambda m: m.push(_OPAQUE),  # EMPTY_SET
    0x91: lambda m: m.push_marked(frozenset),  # FROZENSET
    0x61: PickleReader.append,  # APPEND
    0x65: PickleReader.append_marked,  # APPENDS
    0x73: PickleReader.set_item,  # SETITEM
    0x75: PickleReader.set_marked,  # SETITEMS
    0x90: PickleReader.add_marked,  # ADDITEMS
    0x68: lambda m: m.push_memo("<B"),  # BINGET
    0x6A: lambda m: m.push_memo("<I"),  # LONG_BINGET
    0x71: lambda m: m.memoize("<B"),  # BINPUT
    0x72: lambda m: m.memoize("<I"),  # LONG_BINPUT
    0x94: lambda m: m.memoize(),  # MEMOIZE
    0x63: PickleReader.name_lines,  # GLOBAL
    0x93: PickleReader.name_stack,  # STACK_GLOBAL
    0x52: PickleReader.call,  # REDUCE
    0x81: PickleReader.call,  # NEWOBJ
    0x62: PickleReader.build,  # BUILD
    0x51: PickleReader.storage,  # BINPERSID
}
