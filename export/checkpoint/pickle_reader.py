"""Reads the pickles of PyTorch checkpoints as data, without running them.

`torch.save` writes a pickle that names tensors, and beside it the bytes of their storages. This
reader turns the opcodes into dicts, lists, numbers and descriptions of tensors. Nothing that a
pickle names is imported or called, no tensor is made, and time and memory grow with the length of
the pickle alone: a pickle of a few bytes cannot ask for gigabytes or for ever.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from var_deploy.export.checkpoint.pickled_names import (
    MAX_NUMBER,
    PLAIN_TENSORS,
    TENSORS,
    WITH_ATTRIBUTES,
    BadFileError,
    ForbiddenNameError,
    Name,
    PickledStorage,
    RefusedFileError,
    find_name,
    find_storage,
)

MAX_OPCODES = 500_000  # the largest released model has 13 000, its training some 50 000
STOP = 0x2E
MAX_ARGUMENTS = 9  # one more than any of the functions takes


class _Opaque:
    """A value that holds no weights and is skipped."""


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
        """Return the next object. Raises BadFileError or ForbiddenNameError."""
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
        """Push a value of Python 2's text type."""
        self.push(self._take(self._number(form)).decode("latin-1"))

    def push_tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        for item in items:
            if item is _MARK:
                raise BadFileError(f"a mark within a tuple before byte {self.position}")
        if len(items) < count:
            raise BadFileError(f"fewer than {count} values before byte {self.position}")
        del self._stack[-count:]
        self.push(items)

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
        self.push(find_name(f"{self._line()}.{self._line()}"))

    def name_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise BadFileError(f"a name that is not text before byte {self.position}")
        self.push(find_name(f"{module}.{name}"))

    def call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise BadFileError(f"a call of no function before byte {self.position}")
        self.push(self._called(function.name, arguments))

    def build(self) -> None:
        self._pop()  # attributes such as a state dict's versions
        if self._stack[-1] is _MARK or isinstance(self._stack[-1], Name):
            raise BadFileError(f"attributes of nothing before byte {self.position}")

    def storage(self) -> None:
        self.storages.append(find_storage(self._pop()))
        self.push(self.storages[-1])

    def _called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in ("collections.OrderedDict", "collections.Counter"):
            return self._dict(arguments)
        if name == "torch.Size":
            return arguments[0] if arguments else ()
        if name == WITH_ATTRIBUTES and len(arguments) == 4:
            function, kind, inner, _ = arguments
            if isinstance(kind, Name) and kind.name not in PLAIN_TENSORS:
                raise ForbiddenNameError(kind.name)
            if isinstance(function, Name) and isinstance(inner, tuple):
                name, arguments = function.name, inner
        if name not in TENSORS:
            return _OPAQUE
        try:
            return TENSORS[name](*arguments[:MAX_ARGUMENTS])
        except TypeError:
            raise BadFileError(f"{name.rpartition('.')[2]} with wrong arguments") from None

    def _dict(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Build a dict from nothing, from a dict, or from pairs, as Python 2 wrote it."""
        first = arguments[0] if arguments else ()
        if isinstance(first, dict):
            return first
        if not isinstance(first, (list, tuple)):
            raise BadFileError(f"a dict of {type(first).__name__}")
        self._spend(len(first))  # a pickle can refer to the same pairs many times
        made: dict[str, Any] = {}
        for pair in first:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise BadFileError("a dict of something else than pairs")
            _set(made, *pair)
        return made


def _set(target: dict[str, Any], key: object, value: object) -> None:
    """Store an entry; keys that are numbers become digits, which cannot be made to collide."""
    if isinstance(key, str):
        target[key] = value
    elif isinstance(key, (int, float)) and abs(key) < MAX_NUMBER:
        target[str(key)] = value


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
