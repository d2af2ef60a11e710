"""Samples tokens inside the graph: top-k, top-p, inverse CDF; and mixes codes in more-smooth
graphs.

No sort and no TopK (TensorRT's takes at most 3840): both filters keep the logits above a threshold,
and the threshold is found digit by digit, counting (top-k) or weighing (top-p) the logits on one
side of trial values. k and p are run-time scalars. Equal logits at the top-k threshold all stay,
as in the published code; at the top-p threshold too, where the published code drops some of them in
an order that its sort leaves open. The cumulative sum is two small triangular products, because
CumSum becomes a loop in TensorRT before 10.8.

What is selected is multiplied by a mask of zeros and ones: on a CPU a Where of this size takes
three times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from var_deploy import names
from var_deploy.export.graphs.builder import GraphBuilder

# Thresholds lie on a grid of powers of two, from 2^e, the first above every |logit|, down to
# 2^(e-33). Sums of such steps are exact in fp32 as long as they have 24 bits, so every fp32 number
# of at least 1/512 of the largest |logit| is on the grid; smaller ones are told apart to 2^-32 of
# it.
BITS = 34
# A pass finds d bits of the threshold with 2^d - 1 trial values at once. Wide passes make a graph
# of fewer operators (some 230 with four bits, 520 with one) on more elements, so they pay where
# launches cost more than elements. These limits of elements per pass were the best of those
# measured: on a CPU for 512 and 4096 codes, and on an H100 for fp16 graphs, which run on GPUs.
MOST_BITS = 4
CPU_ELEMENTS = 2**14
GPU_ELEMENTS = 2**21
# TensorRT tries to fuse a chain of reductions as a whole: 16 in a row took 75 s to compile for one
# token, 64 never ended. It does not look through a convolution, so one stands after every fourth
# reduction, and in every wide pass; then all of them compile in 6 s.
FENCE_EVERY = 4
TILE = 64  # of codes, see `_extreme`
# a logit that softmax turns into zero
NO_WEIGHT = -1e30


def sample(
    b: GraphBuilder,
    logits: str,
    uniforms: str,
    temperature: str,
    top_k: str,
    top_p: str,
    *,
    length: int,
    codes: int,
) -> str:
    """Sample: logits [B, L, V], uniforms [B, L], scalars → tokens [B, L] int64.

    `length` is the largest L that the graph is used with.
    """
    with b.scope("sampler"):
        x = b.op("Div", logits, temperature)
        x = b.op("Unsqueeze", x, b.ints(1))  # [B, 1, L, V]; trial values lie along axis 1
        top = _extreme(b, "ReduceMax", x, codes)  # [B, 1, L, 1]
        grid = _grid(b, x, top, codes, _bits(b, b.form.batch * length * codes))
        low = _top_k_threshold(b, x, top, grid, top_k, codes)
        mass = b.op("Exp", b.op("Sub", x, top))  # [B, 1, L, V], unnormalised
        mass = _masked(b, b.op("GreaterOrEqual", x, low), mass)
        low = _top_p_threshold(b, x, mass, grid, top_p)
        # the largest always stays, also where p is too small for 1 - p to differ from 1
        kept = b.op("Or", b.op("Greater", x, low), b.op("GreaterOrEqual", x, top))
        flat = b.ints(0, -1, codes)
        mass = b.op("Reshape", _masked(b, kept, mass), flat, out=names.KEPT_MASS)
        return _inverse_cdf(b, mass, uniforms, codes)


def mix(
    b: GraphBuilder, logits: str, mass: str, noise: str, temperature: str, factor: str, tau: str
) -> str:
    """Return the weights [B, L, V] of the codes in "more smooth" sampling, see
    `sampling.smoothing`.

    `mass` [B, L, V] are the probabilities that `sample` kept: a code without mass has no weight. A
    code that is dropped because its mass is below the smallest fp32 number would have no weight
    either.
    """
    with b.scope("sampler"):
        # tau divides, so digits count: the largest logit is moved to 0 first
        top = b.op("ReduceMax", logits, b.ints(-1), keepdims=1)
        x = b.op("Div", b.op("Sub", logits, top), temperature)
        x = b.op("Add", b.op("Mul", x, factor), noise)
        kept = b.op("Greater", mass, b.constant(0.0, np.float32))
        x = b.op("Where", kept, b.op("Div", x, tau), b.constant(NO_WEIGHT, np.float32))
        return b.op("Softmax", x, axis=-1)


def _masked(b: GraphBuilder, mask: str, x: str) -> str:
    """Return x where the mask is True, else 0."""
    return b.op("Mul", b.cast(mask, np.float32), x)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where thresholds lie, see `BITS`.

    Attributes:
        widths: how many bits each pass finds.
        units: the last bit of every pass, in units of 2^e.
        power: 2^e [B, 1, L, 1].
        start: -2^e, below every logit.
        steps: for every pass of d bits the multiples 1 … 2^d - 1 of its unit, [B, 2^d - 1, L, 1].
    """

    widths: Sequence[int]
    units: Sequence[float]
    power: str
    start: str
    steps: Sequence[str]


def _bits(b: GraphBuilder, elements: int) -> int:
    """Return how many bits a pass over B·L·V elements finds."""
    limit = GPU_ELEMENTS if b.half else CPU_ELEMENTS
    return max([d for d in range(1, MOST_BITS + 1) if (2**d - 1) * elements <= limit], default=1)


def _grid(b: GraphBuilder, x: str, top: str, codes: int, bits: int) -> Grid:
    """Return the grid of logits x [B, 1, L, V] for passes of `bits` bits, the last of the rest."""
    bottom = _extreme(b, "ReduceMin", x, codes)
    zero = b.constant(0.0, np.float32)
    largest = b.op("Max", top, b.op("Sub", zero, bottom))
    powers = np.exp2(np.arange(-126, 128, dtype=np.float32))
    enough = b.op("Greater", b.constant(powers), largest)  # [B, 1, L, 254]
    above = b.op("Where", enough, b.constant(powers), b.constant(powers[-1]))
    power = b.op("ReduceMin", above, b.ints(-1), keepdims=1)
    ends = [*range(bits, BITS, bits), BITS]
    widths = [end - begin for begin, end in pairwise([0, *ends])]
    units = [2.0 ** (1 - end) for end in ends]
    multiples = [np.arange(1, 2**d) * unit for d, unit in zip(widths, units, strict=True)]
    fractions = np.concatenate(multiples).astype(np.float32).reshape(1, -1, 1, 1)
    steps = b.split(b.op("Mul", power, b.constant(fractions)), 1, [len(m) for m in multiples])
    start = b.op("Sub", zero, power)
    return Grid(widths=widths, units=units, power=power, start=start, steps=steps)


def _extreme(b: GraphBuilder, op: str, x: str, codes: int) -> str:
    """ReduceMax or ReduceMin of x [B, 1, L, V] over the codes, [B, 1, L, 1].

    In fp16 graphs, which run on GPUs, in two stages of some 64 numbers each: in one, cuDNN's
    reduction, which ONNX Runtime calls, took about 80 µs for rows of 4096 (docs/BENCHMARKS.md).
    """
    if b.half and codes % TILE == 0:
        tiles = b.op("Reshape", x, b.ints(0, 0, 0, codes // TILE, TILE))
        x = b.op(op, tiles, b.ints(-1), keepdims=0)
    return b.op(op, x, b.ints(-1), keepdims=1)


def _search(b: GraphBuilder, grid: Grid, holds: Callable[[str], str], low: str) -> str:
    """Return the largest t [B, 1, L, 1] of the grid for which `holds` is true, starting at `low`,
    for which it is true.

    `holds` takes trial values [B, T, L, 1], where T may be 1, and gives a mask of that shape. What
    holds for a value holds for every smaller one.
    """
    for turn, steps in enumerate(grid.steps):
        trial = b.op("Add", low, steps)
        if grid.widths[turn] == 1:
            low = b.op("Where", holds(trial), trial, low)
            if turn % FENCE_EVERY == FENCE_EVERY - 1:
                low = _channels(b, low, 1, 1.0)
        else:
            # the trial values that hold are the smallest, so their number is the digit; its
            # product with a power of two is exact
            hits = b.cast(holds(trial), np.float32)
            count = _channels(b, hits, 2 ** grid.widths[turn] - 1, grid.units[turn])
            low = b.op("Add", low, b.op("Mul", grid.power, count))
    return low


def _channels(b: GraphBuilder, x: str, channels: int, factor: float) -> str:
    """Return factor · (the sum of x [B, channels, L, 1] over its channels), by a convolution."""
    weight = b.constant(np.full((1, channels, 1, 1), factor, np.float32))
    return b.op("Conv", x, weight, kernel_shape=[1, 1], pads=[0, 0, 0, 0])


def _top_k_threshold(b: GraphBuilder, x: str, top: str, grid: Grid, top_k: str, codes: int) -> str:
    """Find the largest t [B, 1, L, 1] of the grid with at least k values ≥ t; k = 0 keeps all."""
    off = b.op("Equal", top_k, b.constant(0, np.int64))
    k = b.op("Where", off, b.constant(codes, np.int64), top_k)
    k = b.cast(b.op("Min", k, b.constant(codes, np.int64)), np.float32)

    def enough(threshold: str) -> str:
        above = b.cast(b.op("GreaterOrEqual", x, threshold), np.float32)
        return b.op("GreaterOrEqual", b.op("ReduceSum", above, b.ints(-1), keepdims=1), k)

    # a largest logit next to 0 may not be on the grid, so it is tried first: top-1 is exact
    return _search(b, grid, enough, b.op("Where", enough(top), top, grid.start))


def _top_p_threshold(b: GraphBuilder, x: str, mass: str, grid: Grid, top_p: str) -> str:
    """Find the largest t of the grid with mass(x ≤ t) ≤ 1 - p: the codes above t stay. p = 0 keeps
    all."""
    one, zero = b.constant(1.0, np.float32), b.constant(0.0, np.float32)
    off = b.op("Equal", top_p, zero)
    dropped = b.op("Where", off, zero, b.op("Sub", one, top_p))
    total = b.op("ReduceSum", mass, b.ints(-1), keepdims=1)
    limit = b.op("Mul", total, dropped)

    def drops(threshold: str) -> str:
        below = _masked(b, b.op("LessOrEqual", x, threshold), mass)
        return b.op("LessOrEqual", b.op("ReduceSum", below, b.ints(-1), keepdims=1), limit)

    return _search(b, grid, drops, grid.start)


def _inverse_cdf(b: GraphBuilder, mass: str, uniforms: str, codes: int) -> str:
    """Return the first code whose cumulative mass exceeds u·total; never one without mass.

    Returns V where the logits are not numbers, and only there.
    """
    zero = b.constant(0.0, np.float32)
    block = math.ceil(math.sqrt(codes))
    blocks = math.ceil(codes / block)
    padded = mass
    if block * blocks != codes:
        pads = b.ints(0, 0, 0, 0, 0, block * blocks - codes)
        padded = b.op("Pad", mass, pads, zero)
    shape = b.ints(0, 0, blocks, block)
    tiles = b.op("Reshape", padded, shape)  # [B, L, blocks, block]
    inner = b.op("MatMul", tiles, b.constant(np.triu(np.ones((block, block), np.float32))))
    sums = b.op("ReduceSum", tiles, b.ints(-1), keepdims=0)  # [B, L, blocks]
    before = b.op("MatMul", sums, b.constant(np.triu(np.ones((blocks, blocks), np.float32), 1)))
    cdf = b.op("Add", inner, b.op("Unsqueeze", before, b.ints(-1)))
    # Rounding may leave the sums a hair out of order, so codes without mass are masked out by
    # name, and the target stays below the largest sum of a code that has mass.
    has_mass = b.op("Greater", tiles, zero)
    total = _largest(b, _masked(b, has_mass, cdf), keepdims=1)
    target = b.op("Mul", b.op("Unsqueeze", uniforms, b.ints(-1, -2)), total)
    target = b.op("Min", target, b.op("Mul", total, b.constant(1 - 2.0**-23, np.float32)))
    beyond = b.op("And", has_mass, b.op("Greater", cdf, target))
    # the smallest index among them, counted from the end: ArgMax leaves ties to the backend
    order = np.arange(codes, codes - blocks * block, -1, dtype=np.float32).reshape(blocks, block)
    from_end = _masked(b, beyond, b.constant(order))
    most = _largest(b, from_end, keepdims=0)
    return b.cast(b.op("Sub", b.constant(float(codes), np.float32), most), np.int64)


def _largest(b: GraphBuilder, tiles: str, keepdims: int) -> str:
    """ReduceMax over the last two axes; in fp16 graphs one after the other, see `_extreme`."""
    if not b.half:
        return b.op("ReduceMax", tiles, b.ints(-2, -1), keepdims=keepdims)
    rows = b.op("ReduceMax", tiles, b.ints(-1), keepdims=keepdims)
    return b.op("ReduceMax", rows, b.ints(-2 if keepdims else -1), keepdims=keepdims)
