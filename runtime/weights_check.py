"""Check that all weights of a bundle are finite, before a graph runs.

`export` refuses weights that are NaN or infinite, so they occur only in bundles of other origin.
The images do not always show them: rounding to int8 and clamping hide such values, and the encoder
maps them to code 0.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from var_deploy.bundle.files import BundleFiles
from var_deploy.errors import BundleError
from var_deploy.files.held_files import HeldFile
from var_deploy.finite import is_finite
from var_deploy.runtime.protobuf import fields

FINITE = "all weights are finite"
CHUNK = 1 << 20  # bytes at a time: they stay in a processor's cache
# numbers of fields and types in onnx.proto
_GRAPH, _INITIALIZER = 7, 5
_DATA_TYPE, _NAME, _EXTERNAL = 2, 8, 13
_KEY, _VALUE = 1, 2
_FLOATS: dict[int, np.dtype[Any]] = {1: np.dtype(np.float32), 10: np.dtype(np.float16)}


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """Name, type, offset and length (in bytes) of a floating-point weight in weights.bin."""

    name: str
    dtype: np.dtype[Any]
    offset: int
    length: int


def check_weights(files: BundleFiles) -> None:
    """Raise BundleError where a weight of a precision is NaN or infinite, in any of its graphs.

    Reads the open files that `files.check` has checked, and opens nothing by path; does nothing
    where the record of `files` says that this content was looked at. The error names the first such
    weight, or a file that cannot be read.
    """
    if files.has_fact(FINITE):
        return
    weights: dict[tuple[int, int], StoredWeight] = {}
    file, graphs = files.checked()
    path = file.path
    for graph in graphs:
        try:
            weights |= {(w.offset, w.length): w for w in stored_weights(graph)}
        except ValueError as error:
            raise BundleError(
                f"a graph beside {path} is damaged ({error}); export the bundle again"
            ) from None
    if not weights:
        return
    try:
        for place in sorted(weights):
            _check(file, weights[place])
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BundleError(f"{path} is damaged ({error}); export the bundle again") from None
    files.add_fact(FINITE)


def stored_weights(model: bytes) -> Iterator[StoredWeight]:
    """Iterate over the fp32 and fp16 weights that an ONNX file stores in weights.bin.

    Raises ValueError where the file is malformed.
    """
    for number, graph in fields(memoryview(model)):
        if number == _GRAPH and isinstance(graph, memoryview):
            for kind, tensor in fields(graph):
                if kind == _INITIALIZER and isinstance(tensor, memoryview):
                    weight = _stored(tensor)
                    if weight is not None:
                        yield weight


def _stored(tensor: memoryview) -> StoredWeight | None:
    name, kind, place = "", 0, dict[str, str]()
    for number, value in fields(tensor):
        if number == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif number == _NAME and isinstance(value, memoryview):
            name = bytes(value).decode(errors="replace")
        elif number == _EXTERNAL and isinstance(value, memoryview):
            pair = {
                field: bytes(text).decode(errors="replace")
                for field, text in fields(value)
                if isinstance(text, memoryview)
            }
            place[pair.get(_KEY, "")] = pair.get(_VALUE, "")
    if not place or kind not in _FLOATS:
        return None
    offset, length = int(place.get("offset", "0")), int(place.get("length", "0"))
    return StoredWeight(name=name, dtype=_FLOATS[kind], offset=offset, length=length)


def _check(file: HeldFile, weight: StoredWeight) -> None:
    end = weight.offset + weight.length
    if weight.offset < 0 or weight.length < 0 or end > file.size:
        raise ValueError(f"{weight.name} lies beyond its end")
    for first in range(weight.offset, end, CHUNK):
        size = min(CHUNK, end - first)
        # mapped piece by piece: the pages of a map count as memory of the process until it is
        # closed, and sessions are packing their own copies meanwhile
        start = first - first % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(
            file.descriptor, first + size - start, access=mmap.ACCESS_READ, offset=start
        ) as held:
            count = size // weight.dtype.itemsize
            values = np.frombuffer(held, weight.dtype, count, first - start)
            wrong = None
            if not is_finite(values):
                number = int(np.argmin(np.isfinite(values)))
                place = (first - weight.offset) // values.itemsize + number
                wrong = (float(values[number]), place)
            del values  # a map cannot be closed while an array looks at it
        if wrong:
            raise BundleError(
                f"{file.path}: value {wrong[1]} of {weight.name} is {wrong[0]}, which var-deploy "
                "export refuses; export the bundle again from a healthy checkpoint"
            )
