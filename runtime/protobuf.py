"""A reader of protobuf messages, field by field, with the wire types that ONNX files use.

The runtime does not depend on the onnx package. Field numbers are defined in onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LONGEST_VARINT = 10  # bytes of a 64-bit number, seven bits each


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Iterate over (number, value) of every field: varints as int, all other types as bytes.

    Raises ValueError where the message is cut short or malformed.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == BYTES:
            length, position = _varint(message, position)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"field {number} has wire type {wire}")
        if length > end - position:
            raise ValueError(f"field {number} is cut short")
        yield number, message[position : position + length]
        position += length


def varints(packed: int | memoryview) -> list[int]:
    """The integers of a repeated field, from one varint or from packed bytes."""
    if isinstance(packed, int):
        return [packed]
    found, position = [], 0
    while position < len(packed):
        value, position = _varint(packed, position)
        found.append(value)
    return found


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(LONGEST_VARINT):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, position
    raise ValueError("a number is cut short")
