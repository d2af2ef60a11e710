"""Zip files with any sizes and contents, also those that `zipfile` would not write."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@dataclass(frozen=True)
class Record:
    """`content` as it lies in the file; `size` is what the file says that it inflates to."""

    name: str
    content: bytes
    size: int | None = None
    method: int = STORED


def pack(records: Sequence[Record]) -> bytes:
    """The bytes of an archive, each record on a 64-byte border as torch.save has them."""
    parts, directory, at = [], [], 0
    for record in records:
        name = record.name.encode()
        padding = -(at + 30 + len(name) + 4) % 64
        extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        crc, size = zlib.crc32(record.content), len(record.content)
        said = size if record.size is None else record.size
        fields = (20, 0, record.method, 0, 0, crc, size, said, len(name))
        local = struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields, len(extra)) + name + extra
        directory.append(
            struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, *fields, 0, 0, 0, 0, 0, at) + name
        )
        parts += [local, record.content]
        at += len(local) + size
    listed = b"".join(directory)
    end = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, len(records), len(records), len(listed), at, 0
    )
    return b"".join([*parts, listed, end])


def unpack(path: Path) -> list[Record]:
    """The records of a sound archive."""
    with zipfile.ZipFile(path) as archive:
        return [Record(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def zeros(megabytes: int) -> bytes:
    """A deflated stream that inflates to so many megabytes, made in no time."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + packer.flush()
