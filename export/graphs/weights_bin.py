"""Writes weights.bin: every weight of a precision once, streamed from the checkpoint."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.errors import ExportError
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey, Weight
from var_deploy.finite import describe_not_finite, is_finite
from var_deploy.manifest import FileInfo

PAGE = 4096  # a runtime maps a tensor straight from the file where it starts on a page
SMALL_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """The place of each weight in weights.bin; large tensors start on a page."""

    weights: dict[str, Weight]
    offsets: dict[str, int]
    size: int

    def locate(self, name: str) -> tuple[str, int, int]:
        """Return (file, offset, length) of a weight, as ONNX external data states it."""
        return names.WEIGHTS, self.offsets[name], self.weights[name].nbytes


def plan_layout(graphs: Iterable[GraphBuilder]) -> WeightLayout:
    """Collect the weights of all graphs, each once, in order of first use."""
    collected: dict[str, Weight] = {}
    for graph in graphs:
        for weight in graph.weights.values():
            known = collected.setdefault(weight.name, weight)
            if (known.shape, known.dtype) != (weight.shape, weight.dtype):
                raise ExportError(f"two graphs disagree on {weight.name}")
    offsets, position = {}, 0
    for weight in collected.values():
        alignment = PAGE if weight.nbytes >= PAGE else SMALL_ALIGNMENT
        position = -(-position // alignment) * alignment
        offsets[weight.name] = position
        position += weight.nbytes
    return WeightLayout(weights=collected, offsets=offsets, size=position)


def write_weights(
    path: Path, layout: WeightLayout, read: ReadKey, progress: Callable[[int], None]
) -> FileInfo:
    """Write weights.bin tensor by tensor; `progress` is called with the bytes written.

    Raises ExportError where a tensor is not finite, a weight does not fit its type or the disk is
    full.
    """
    digest, position = hashlib.sha256(), 0
    try:
        with path.open("wb") as stream:
            for weight in layout.weights.values():
                gap = bytes(layout.offsets[weight.name] - position)
                data = make_weight(weight, read)
                for piece in (gap, data.reshape(-1).view(np.uint8).data):
                    stream.write(piece)
                    digest.update(piece)
                position = layout.offsets[weight.name] + weight.nbytes
                progress(weight.nbytes + len(gap))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(
                f"the disk is full: {path.name} needs {layout.size / 1e6:.0f} MB; free some space "
                "or choose another --out"
            ) from None
        raise ExportError(f"cannot write {path.name}: {error.strerror}") from None
    return FileInfo(size=position, sha256=digest.hexdigest())


def make_weight(weight: Weight, read: ReadKey) -> NDArray[Any]:
    """Return the values of a weight in its type.

    Raises ExportError where a checkpoint tensor is not finite, which rounding to int8 would hide,
    or where a value does not fit the type.
    """

    return _cast(weight, weight.make(_FiniteReader(weight.name, read)))


class _FiniteReader:
    """Reads the checkpoint tensors of one weight, and refuses those that are not finite.

    Readers of the same checkpoint are equal, whatever weight they read for, so that a `make` can
    cache by the reader what several weights are made of.
    """

    def __init__(self, weight: str, read: ReadKey) -> None:
        self._weight, self._read = weight, read

    def __call__(self, key: str) -> NDArray[Any]:
        value = self._read(key)
        if not is_finite(value):
            source = "" if key == self._weight else f", of which {self._weight} is made,"
            raise ExportError(
                f"the checkpoint's {key}{source} holds {describe_not_finite(value)}; training "
                "diverged or the file is damaged: export another checkpoint"
            )
        return value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FiniteReader) and self._read is other._read

    def __hash__(self) -> int:
        return id(self._read)


def check_weights(graph: GraphBuilder, read: ReadKey) -> None:
    """Raise the ExportError that writing the weights of a graph would raise; nothing is written."""
    for weight in graph.weights.values():
        make_weight(weight, read)


def _cast(weight: Weight, value: NDArray[Any]) -> NDArray[Any]:
    if value.size != np.prod(weight.shape, dtype=np.int64):
        raise ExportError(f"{weight.name} is {list(value.shape)}, expected {list(weight.shape)}")
    if weight.dtype.kind == "i":
        limits = np.iinfo(weight.dtype)
        if value.size and not limits.min <= value.min() <= value.max() <= limits.max:
            raise ExportError(
                f"{weight.name} holds values that {weight.dtype} cannot (largest magnitude "
                f"{np.abs(value).max():.3g}); export with --precision fp32"
            )
    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(value, dtype=weight.dtype).reshape(weight.shape)
    if not is_finite(data):
        raise ExportError(
            f"{weight.name} holds values that {_short(weight.dtype)} cannot (largest magnitude "
            f"{np.abs(value).max():.3g}); export with --precision fp32"
        )
    return data


def _short(dtype: np.dtype[Any]) -> str:
    """Return the short name of a type: "fp16" for float16."""
    return f"fp{dtype.itemsize * 8}"
