"""Check that ONNX Runtime computes int8 correctly on this processor, run before int8 is used.

    python -m var_deploy.runtime.backends.int8_check

ONNX Runtime fuses the operators of an int8 bundle and runs them in kernels written for one
instruction set each. A wrong kernel raises no error but computes noise, so the operators run once
per process on inputs whose results are known: all results are integers times powers of two, or far
from a rounding boundary, so every correct kernel gives the same bits. The graph is written by
export/int8/probe.py, from the patterns below.
"""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.bundle.files import GraphFile
from var_deploy.errors import BackendError
from var_deploy.host.machine import Machine, processor_name
from var_deploy.planning.precisions import refuse_int8
from var_deploy.runtime.backends.host_memory import host_view
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.backends.protocol import Array

GRAPH = Path(__file__).with_name("int8_probe.onnx")
# Rows of a product. Kernels use tiles of 4 to 64 rows; most of these are not multiples of them.
ROWS = (1, 4, 9, 37, 100, 256)
# (name, inner size, columns of each product of the same input, images a row, bias)
PRODUCTS: tuple[tuple[str, int, tuple[int, ...], int, bool], ...] = (
    ("product", 64, (96,), 1, False),
    ("product+bias", 37, (29,), 2, True),
    ("products", 132, (67, 24), 2, True),
)
# (name, channels in, channels out, side of the kernel, padding: top, left, bottom, right)
CONVOLUTIONS = (
    ("convolution 3x3", 32, 36, 3, (1, 1, 1, 1)),
    ("convolution 2x2", 24, 20, 2, (1, 1, 0, 0)),
)
SIDE = 9  # of the convolutions' maps
ZERO = 100  # zero point of inputs that reach from -100 to 155
STEP = 1 / 16  # of the inputs
CONV_ZERO, CONV_STEP = 128, 515.0 / 2048


def integers(count: int, factor: int, modulus: int, low: int) -> NDArray[np.int64]:
    """`count` integers in [low, low + modulus) without a short period, as in the graph."""
    numbers = np.arange(count, dtype=np.int64)
    found: NDArray[np.int64] = (numbers * numbers * factor + numbers * 17) % modulus + low
    return found


def weights(count: int) -> NDArray[np.int64]:
    """int8 weights; two of them times 255 fit into 16 bits, as in every bundle."""
    return integers(count, 31, 127, -63)


def column_scales(columns: int) -> NDArray[np.float32]:
    """Scale of each column: a power of two."""
    found: NDArray[np.float32] = np.exp2(-4.0 - np.arange(columns) % 3).astype(np.float32)
    return found


def bias(columns: int) -> NDArray[np.float32]:
    """fp32 bias of a product, one number per column."""
    return (integers(columns, 5, 4096, -2048) / 1024).astype(np.float32)


def conv_divisors(channels: int) -> NDArray[np.int64]:
    """Divisors of the sums: odd numbers, so that no quotient ends in one half."""
    return 515 + 2 * (np.arange(channels) * 37 % 256)


def conv_scales(channels: int) -> NDArray[np.float32]:
    """Scales of the weights: input step · scale / output step is 1 / divisor."""
    return (CONV_STEP / STEP / conv_divisors(channels)).astype(np.float32)


def conv_bias(channels: int) -> NDArray[np.int32]:
    """int32 bias of a convolution, one number per output channel."""
    return integers(channels, 7, 20_000, -10_000).astype(np.int32)


def inputs(rows: int) -> dict[str, NDArray[Any]]:
    """Inputs of the graph by name; the input of every product holds both extreme values."""
    found: dict[str, NDArray[Any]] = {}
    for name, inner, _, images, _ in PRODUCTS:
        x = integers(rows * images * inner, 7, 256, -ZERO)
        x[:2] = -ZERO, 255 - ZERO
        shape = (rows, inner) if images == 1 else (rows, images, inner)
        found[f"x.{name}"] = (x * STEP).astype(np.float32).reshape(shape)
    for name, channels, *_ in CONVOLUTIONS:
        x = integers(channels * SIDE * SIDE, 11, 256, 0)
        found[f"x.{name}"] = x.astype(np.uint8).reshape(1, channels, SIDE, SIDE)
    return found


def expected(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The exact outputs for `feeds` by name; float64 holds every sum exactly."""
    found: dict[str, NDArray[Any]] = {}
    for name, inner, columns, _, biased in PRODUCTS:
        for place, width in enumerate(columns):
            matrix = weights(inner * width).reshape(inner, width) * column_scales(width)
            y = feeds[f"x.{name}"].astype(np.float64) @ matrix
            found[f"y.{name}.{place}"] = (y + bias(width) if biased else y).astype(np.float32)
    for name, channels, out, side, pads in CONVOLUTIONS:
        x = feeds[f"x.{name}"].astype(np.float64) - CONV_ZERO
        x = np.pad(x, ((0, 0), (0, 0), pads[::2], pads[1::2]))
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), (2, 3))
        rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(SIDE * SIDE, -1)
        kernel = weights(out * channels * side * side).reshape(out, -1)
        sums = rows @ kernel.T.astype(np.float64) + conv_bias(out)
        y = np.clip(np.rint(sums / conv_divisors(out)) + CONV_ZERO, 0, 255)
        found[f"y.{name}"] = y.T.reshape(1, out, SIDE, SIDE).astype(np.uint8)
    return found


def check_int8(backend: OrtCpuBackend) -> None:
    """Raise BackendError where ONNX Runtime computes int8 wrongly on this processor."""
    refuse_int8(int8_problem(backend))


def int8_problem(backend: OrtCpuBackend) -> str:
    """The error of int8 on this processor, "" where it is correct. Runs once per process."""
    global _found
    with _asking:
        if _found is None:
            wrong = _wrong(backend)
            _found = wrong and (
                f"onnxruntime {backend.version} computes int8 wrongly on this processor "
                f"({processor_name(Machine())}): {wrong}"
            )
        return _found


_found: str | None = None
_asking = Lock()


def _wrong(backend: OrtCpuBackend) -> str:
    """Describe the first output that differs from the expected one; "" where none does."""
    try:
        session = backend.open(GraphFile.outside(GRAPH))
        feeds = inputs(max(ROWS))
        wanted = expected(feeds)
        for rows in ROWS:
            some, known = _first_rows(feeds, rows), _first_rows(wanted, rows)
            outputs = {name: _array(backend, value) for name, value in known.items()}
            session.bind({name: _filled(backend, x) for name, x in some.items()}, outputs)()
            for name, value in known.items():
                problem = _difference(host_view(outputs[name]), value)
                if problem:
                    return f"{name.removeprefix('y.')} of {rows} rows has {problem}"
    except BackendError as error:
        return str(error)
    return ""


def _first_rows(arrays: dict[str, NDArray[Any]], rows: int) -> dict[str, NDArray[Any]]:
    """Cut the arrays of products to `rows`; row 0 holds both extremes, so the scales stay."""
    products = ("x.product", "y.product")
    return {n: a[:rows] if n.startswith(products) else a for n, a in arrays.items()}


def _difference(found: NDArray[Any], wanted: NDArray[Any]) -> str:
    wrong = np.flatnonzero(found != wanted)
    if not wrong.size:
        return ""
    first = wrong[0]
    return (
        f"{len(wrong)} of {wanted.size} values wrong (the first is {found.flat[first]}, expected "
        f"{wanted.flat[first]})"
    )


def _array(backend: OrtCpuBackend, like: NDArray[Any]) -> Array:
    block = backend.allocate(like.nbytes)
    return Array(block.address, like.shape, like.dtype, block.owner)


def _filled(backend: OrtCpuBackend, values: NDArray[Any]) -> Array:
    array = _array(backend, values)
    host_view(array)[...] = values
    return array


def main() -> int:
    """Print the error of int8 on this processor, or an empty line where it is correct."""
    try:
        print(int8_problem(OrtCpuBackend()))
    except BackendError as error:
        print(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
