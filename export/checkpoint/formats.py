"""Opens the three formats of checkpoint files: zip `.pth`, old `.pth`, and `.safetensors`.

A format is recognised by a file's first bytes, not by its name. Files are mapped: opening one reads
the list of its tensors alone, which is bounded, and a tensor is read when it is asked for. Sizes
that a file claims are held against its length before anything is made of them.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open

from var_deploy.errors import CheckpointError, one_line
from var_deploy.export.checkpoint.mapped_file import ITEM_SIZES, MappedFile, StoredTensor
from var_deploy.export.checkpoint.pickle_reader import PickleReader
from var_deploy.export.checkpoint.pickled_names import (
    BadFileError,
    ForbiddenNameError,
    PickledTensor,
    RefusedFileError,
)

MAX_PICKLE = 16 << 20  # bytes; the largest released model has 50 kB, its training some hundred
MAX_HEADER = 8 << 20  # bytes of a safetensors header
MAX_NAMES = 50_000  # names per file; a training checkpoint has some thousands

MAX_REASON = 300  # characters of a library's words

ZIP_SIGNATURE = b"PK\x03\x04"
PICKLE_SIGNATURE = b"\x80"
LFS_SIGNATURE = b"version https://git-lfs"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before PyTorch 1.6
LEGACY_VERSION = 1001
LOCAL_HEADER = 30  # bytes before the name of a zip record
ENCRYPTED = 0x1

# safetensors' names of types as torch spells them
SAFETENSORS_TYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint file: nested dicts of tensors; `tensor` returns one of them.

    A dict may occur several times, even inside itself. `tensor` raises CheckpointError where the
    file does not hold what it says.
    """

    tree: object
    is_tensor: Callable[[object], bool]
    tensor: Callable[[str, Any], StoredTensor]


def open_contents(path: Path) -> Contents:
    """Open a checkpoint file and return its contents.

    Raises CheckpointError for a file that is missing or is not a checkpoint.
    """
    with _open(path) as stream:
        mapped = MappedFile(path, stream)
    head = mapped.bytes(0, len(LFS_SIGNATURE))
    if head == LFS_SIGNATURE:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
    header = int.from_bytes(head[:8], "little")
    named = path.suffix.lower() == ".safetensors"
    if head[8:9] == b"{" and (named or header <= mapped.size):
        return _safetensors(path, header, mapped.size)
    if head.startswith(ZIP_SIGNATURE):
        return _zipped(mapped)
    if head.startswith(PICKLE_SIGNATURE):
        return _legacy(mapped)
    if named:
        raise CheckpointError(
            f"{path} is not a safetensors file: expected its header's length, then a JSON object"
        )
    raise CheckpointError(
        f"{path} is not a checkpoint: expected a PyTorch .pth or a .safetensors file"
    )


def shown(text: str, limit: int) -> str:
    """Return a text of a file for a message: control characters escaped, cut where it is long."""
    if not text.isprintable():
        text = text[: limit + 1].encode("unicode_escape").decode("ascii")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def check_names(path: Path, count: int) -> None:
    """Raise CheckpointError where a file lists more names than any model has."""
    if count > MAX_NAMES:
        raise CheckpointError(
            f"{path} is refused: it lists more than {MAX_NAMES} names; save the state_dict() alone"
        )


def _open(path: Path) -> BinaryIO:
    """Open a regular file; a pipe, which would block, and a device are refused."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a folder, expected a checkpoint file")
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "special file")
            raise CheckpointError(f"{path} is a {kind}, expected a checkpoint file")
        return path.open("rb")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from None


_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device"}
_KINDS[stat.S_IFBLK] = _KINDS[stat.S_IFCHR]


# zip, what torch.save writes


def _zipped(mapped: MappedFile) -> Contents:
    path, stream = mapped.path, mapped.seekable()
    try:
        if not zipfile.is_zipfile(stream):
            raise BadFileError(
                f"{mapped.size} bytes, the archive's directory at its end is missing"
            )
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception as error:  # garbage makes zipfile fail in many ways
        raise _damaged(path, error) from None
    records = {entry.filename: entry for entry in entries}
    if len(records) < len(entries):
        raise _damaged(path, BadFileError("several records of one name"))
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} is an archive, but not a PyTorch checkpoint (no record */data.pkl)"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in records:
        raise CheckpointError(
            f"{path} is a TorchScript program, expected a checkpoint; save its state_dict() alone"
        )
    ranges: dict[str, tuple[int, int]] = {}

    def tensor(name: str, said: PickledTensor) -> StoredTensor:
        if said.storage is None:
            return mapped.tensor((0, 0), said)
        key = said.storage.key
        try:
            if key not in ranges:
                ranges[key] = _stored_record(mapped, records[f"{folder}data/{key}"])
            return mapped.tensor(ranges[key], said)
        except KeyError:
            raise _damaged(path, BadFileError(f"no record data/{key[:20]}"), name) from None
        except BadFileError as error:
            raise _damaged(path, error, name) from None

    order = records.get(f"{folder}byteorder")
    data = _pickled(path, lambda: _small_record(mapped, records[pickles[0]], MAX_PICKLE))
    if order is not None and _pickled(path, lambda: _small_record(mapped, order, 16)) != b"little":
        raise CheckpointError(f"{path} has another byte order than little-endian; save it again")
    tree = _pickled(path, PickleReader(data).read)
    return Contents(tree, lambda leaf: isinstance(leaf, PickledTensor), tensor)


def _record(mapped: MappedFile, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return where the bytes of a zip record lie in the file, as they are stored."""
    header = mapped.bytes(entry.header_offset, entry.header_offset + LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or header[:4] != ZIP_SIGNATURE:
        raise BadFileError(f"record {entry.filename[:40]!r} does not begin where it should")
    name, extra = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + LOCAL_HEADER + name + extra
    end = start + entry.compress_size
    if end > mapped.size:
        raise BadFileError(f"record {entry.filename[:40]!r} ends after the file does")
    if entry.flag_bits & ENCRYPTED:
        raise RefusedFileError(f"record {entry.filename[:40]!r} is encrypted")
    return start, end


def _stored_record(mapped: MappedFile, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return the place of a zip record that is stored uncompressed, so that it can be mapped."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise RefusedFileError(
            f"record {entry.filename[:40]!r} is compressed, which torch.save never does; load the "
            "file with torch and save it again"
        )
    return _record(mapped, entry)


def _small_record(mapped: MappedFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    """Return the content of a small zip record, which another tool may have compressed."""
    start, end = _record(mapped, entry)
    # one byte more than is allowed, so that nothing larger is ever made
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        packed = mapped.bytes(start, min(end, start + limit))
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit + 1)
    elif entry.compress_type == zipfile.ZIP_STORED:
        content = mapped.bytes(start, min(end, start + limit + 1))
    else:
        raise RefusedFileError(f"record {entry.filename[:40]!r} is packed by an unknown method")
    if len(content) > limit:
        raise RefusedFileError(
            f"record {entry.filename[:40]!r} has more than {limit} bytes; save the state_dict() "
            "alone"
        )
    return content


# the format of before PyTorch 1.6


def _legacy(mapped: MappedFile) -> Contents:
    """Read the old format: five pickles in a row, then the storages in the order of the fifth."""
    path = mapped.path
    reader = PickleReader(mapped.bytes(0, MAX_PICKLE))
    if _pickled(path, reader.read) != LEGACY_MAGIC or _pickled(path, reader.read) != LEGACY_VERSION:
        raise CheckpointError(
            f"{path} is a pickle, but not a PyTorch checkpoint; write it with torch.save"
        )
    system = _pickled(path, reader.read)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise CheckpointError(f"{path} has another byte order than little-endian; save it again")
    tree = _pickled(path, reader.read)
    keys = _pickled(path, reader.read)
    units = {said.key: said.dtype.itemsize for said in reader.storages if said.dtype is not None}
    ranges: dict[str, tuple[int, int]] = {}
    at = reader.position
    for key in keys if isinstance(keys, list) else []:
        count = int.from_bytes(mapped.bytes(at, at + 8), "little")
        unit = units.get(key) if isinstance(key, str) else None
        if unit is None:
            raise _damaged(path, BadFileError("a storage that no tensor lies in"))
        ranges[key] = (at + 8, at + 8 + count * unit)
        at = ranges[key][1]
        if at > mapped.size:
            raise _damaged(
                path, BadFileError(f"{mapped.size} bytes, its tensors need {at} or more")
            )

    def tensor(name: str, said: PickledTensor) -> StoredTensor:
        try:
            place = (0, 0) if said.storage is None else ranges[said.storage.key]
            return mapped.tensor(place, said)
        except KeyError:
            raise _damaged(path, BadFileError("its storage is missing"), name) from None
        except BadFileError as error:
            raise _damaged(path, error, name) from None

    return Contents(tree, lambda leaf: isinstance(leaf, PickledTensor), tensor)


def _pickled(path: Path, read: Callable[[], Any]) -> Any:
    """Call a function that reads a pickle; its errors become messages about the file."""
    try:
        return read()
    except ForbiddenNameError as error:
        raise CheckpointError(
            f"{path} is refused: loading it would run {shown(str(error), 100)}, and only tensors "
            "are accepted; save its state_dict() alone and give that"
        ) from None
    except (BadFileError, struct.error, zlib.error) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception, name: str = "") -> CheckpointError:
    """Turn an error into a message about the file, and about the tensor of that name."""
    reason = shown(f"{name}: {one_line(error)}" if name else one_line(error), MAX_REASON)
    if isinstance(error, RefusedFileError):
        return CheckpointError(f"{path} is refused: {reason}")
    return CheckpointError(f"{path} is truncated or damaged ({reason}); download it again")


# safetensors


def _safetensors(path: Path, header: int, size: int) -> Contents:
    if header + 8 > size or header > MAX_HEADER:
        fault = f"the file has {size}" if header + 8 > size else f"{MAX_HEADER >> 20} MB at most"
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file (its header says that it has {header} "
            f"bytes, {fault}); download it again"
        )
    try:
        handle: Any = safe_open(path, framework="pt")
        keys: list[str] = handle.keys()
        check_names(path, len(keys))
        tensors = {key: _sliced(handle, key) for key in keys}
    except CheckpointError:
        raise
    except Exception as error:  # the library raises exceptions of its own and Python's
        raise CheckpointError(
            f"{path} is not a safetensors file or is truncated ({_sentence(error)}); "
            "download it again"
        ) from None
    return Contents(tensors, lambda leaf: isinstance(leaf, StoredTensor), lambda _, leaf: leaf)


def _sliced(handle: Any, key: str) -> StoredTensor:
    part = handle.get_slice(key)
    shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
    dtype = SAFETENSORS_TYPES.get(dtype, dtype)
    # the library has compared the sizes with the file
    stored = prod(shape) * ITEM_SIZES.get(dtype, 0)
    return StoredTensor(shape, dtype, stored, partial(handle.get_tensor, key))


def _sentence(error: Exception) -> str:
    return shown(one_line(error).split(". ")[0].rstrip("."), MAX_REASON)
