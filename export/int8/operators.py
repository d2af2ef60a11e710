"""int8 quantisation of matrices and kernels, and the operators that multiply with them.

Weights are signed, symmetric, one scale an output channel; activations are unsigned with a zero
point. Standard operators only: ONNX Runtime fuses them where it has better ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from var_deploy.export.graphs.builder import GraphBuilder, ReadKey

LIMIT = 127
BIAS_LIMIT = 2.0**30  # largest magnitude of a convolution's int32 bias; leaves room for the sums


@dataclass(frozen=True, kw_only=True)
class Range:
    """Smallest and largest value of a tensor; values beyond them are clipped.

    Zero is always inside, as the padding of a convolution needs it.
    """

    low: float
    high: float

    @property
    def scale(self) -> float:
        """The size of one quantisation step, as an fp32 number."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        return float(np.float32(max(high - low, 1e-6) / 255))

    @property
    def zero_point(self) -> int:
        """The integer that stands for 0."""
        return min(max(round(-min(self.low, 0.0) / self.scale), 0), 255)


@dataclass(frozen=True, kw_only=True)
class ConvRanges:
    """Value ranges of the input and the output of a convolution."""

    input: Range
    output: Range


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Weights of a convolution: name, shape [out, in, h, w], and the function that makes them."""

    name: str
    shape: tuple[int, int, int, int]
    make: Callable[[ReadKey], NDArray[Any]]


Ranges = Mapping[str, ConvRanges]  # ranges by the checkpoint key of the convolution


def weight_scale(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return one scale per row of [out, in]: w ≈ scale · q.

    x86 processors without VNNI add two neighbouring products in 16 bits and cut off what does not
    fit: with inputs up to 255, two neighbours may come to 128 together. The scale follows the
    largest such pair, so the integers that come out are the same on every machine; that costs
    half a bit, where the usual answer, 7-bit weights, costs a whole one.
    """
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    first, second = rows[:, ::2], rows[:, 1::2]
    positive = np.maximum(first, 0) + np.maximum(second, 0)
    negative = np.minimum(first, 0) + np.minimum(second, 0)
    largest = np.maximum(positive.max(axis=1), -negative.min(axis=1))
    scale: NDArray[np.float32] = np.maximum(largest / LIMIT, 1e-12).astype(np.float32)
    return scale


def round_rows(
    rows: NDArray[np.float32], scale: NDArray[np.float32] | None = None
) -> NDArray[np.int8]:
    """Quantise the rows of [out, in] to int8; `scale` [out] replaces `weight_scale`."""
    scale = weight_scale(rows) if scale is None else scale
    q: NDArray[np.int8] = np.rint(rows / scale[:, None]).astype(np.int8)
    return q


def kernel_rows(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Reorder a kernel [out, in, h, w] → [out, h·w·in], the order in which ONNX Runtime
    multiplies."""
    rows: NDArray[np.float32] = kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
    return rows


def dynamic_linear(
    b: GraphBuilder,
    x: str,
    key: str,
    rows: Callable[[ReadKey], NDArray[Any]],
    width_in: int,
    width_out: int,
) -> str:
    """Multiply x [..., G, in] → [..., G, out] in int8 with the matrix [out, in] that `rows` makes,
    stored as `key`.

    x is quantised at run time, each image by itself: an image must not depend on the others in its
    batch.
    """

    def matrix(read: ReadKey) -> NDArray[Any]:
        rounded: NDArray[Any] = round_rows(rows(read)).T
        return rounded

    def scales(read: ReadKey) -> NDArray[Any]:
        return weight_scale(rows(read))

    weight = b.weight(key, (width_in, width_out), matrix, np.int8)
    scale = b.weight(f"{key}.scale", (width_out,), scales)

    def product(x: str) -> str:
        q, x_scale, zero = b.ops("DynamicQuantizeLinear", (x,), 3)
        sums = b.op("Cast", b.op("MatMulInteger", q, weight, zero), to=1)
        return b.op("Mul", sums, b.op("Mul", x_scale, scale))

    if b.form.batch == 1:
        return product(x)
    images = b.split(b.reshape(x, -1, b.form.batch, width_in), 1, [1] * b.form.batch)
    together = b.op("Concat", *(product(image) for image in images), axis=1)
    return b.reshape(together, -1, b.form.rows, width_out)


def quantize(b: GraphBuilder, x: str, to: Range) -> str:
    return b.op("QuantizeLinear", x, *_constants(b, to))


def dequantize(b: GraphBuilder, x: str, of: Range) -> str:
    return b.op("DequantizeLinear", x, *_constants(b, of))


def _constants(b: GraphBuilder, range: Range) -> tuple[str, str]:
    return b.constant(range.scale, np.float32), b.constant(range.zero_point, np.uint8)


def static_conv(
    b: GraphBuilder,
    x: str,
    key: str,
    kernel: Kernel,
    ranges: ConvRanges,
    pads: Sequence[int],
) -> str:
    """Convolve quantised x [B, in, s, s] → quantised [B, out, s, s], with the checkpoint's bias of
    `key`."""
    channels = kernel.shape[0]
    zeros = b.constant(np.zeros(channels, np.int8))

    def scales(read: ReadKey) -> NDArray[Any]:
        # the bias is counted in steps of the products: where a channel's weights are next to
        # nothing (pruned ones are zero), int32 would not hold it in steps as small as they ask for
        least = np.abs(read(f"{key}.bias")) / np.float32(ranges.input.scale * BIAS_LIMIT)
        plain = weight_scale(kernel_rows(kernel.make(read)))
        scale: NDArray[np.float32] = np.maximum(plain, least.astype(np.float32))
        return scale

    def values(read: ReadKey) -> NDArray[Any]:
        rows = round_rows(kernel_rows(kernel.make(read)), scales(read))
        out, width, *sides = kernel.shape
        rounded: NDArray[Any] = rows.reshape(out, *sides, width).transpose(0, 3, 1, 2)
        return rounded

    def bias(read: ReadKey) -> NDArray[Any]:
        # products are sums of q · (x's rounded value), so the bias is counted in the same unit
        counted: NDArray[Any] = np.rint(read(f"{key}.bias") / (ranges.input.scale * scales(read)))
        return counted

    return b.op(
        "QLinearConv",
        x,
        *_constants(b, ranges.input),
        b.weight(kernel.name, kernel.shape, values, np.int8),
        b.weight(f"{kernel.name}.scale", (channels,), scales),
        zeros,
        *_constants(b, ranges.output),
        b.weight(f"{kernel.name}.bias", (channels,), bias, np.int32),
        kernel_shape=list(kernel.shape[2:]),
        pads=list(pads),
    )
