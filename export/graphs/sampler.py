"""Samples tokens inside the graph: top-k, top-p, inverse CDF; and mixes codes in more-smooth
graphs.

No sort and no TopK (TensorRT's takes at most 3840): both filters keep the logits above a threshold,
and the threshold is found bit by bit, counting (top-k) or weighing (top-p) the logits on one side
of a trial value. k and p are run-time scalars. Equal logits at the top-k threshold all stay,
as in the published code; at the top-p threshold too, where the published code drops some of them in
an order that its sort leaves open. The cumulative sum is two small triangular products, because
CumSum becomes a loop in TensorRT before 10.8.

What is selected is multiplied by a mask of zeros and ones: on a CPU a Where of this size takes
three times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from var_deploy import names
from var_deploy.export.graphs.builder import GraphBuilder

# Trial values lie on a grid of powers of two, from 2^e, the first above every |logit|, down to
# 2^(e-33). Sums of such steps are exact in fp32 as long as they have 24 bits, so every fp32 number
# of at least 1/512 of the largest |logit| is on the grid; smaller ones are told apart to 2^-32 of
# it.
STEPS = 34
# TensorRT tries to fuse a chain of reductions as a whole: 16 in a row took 75 s to compile for one
# token, 64 never ended. It does not look through a convolution, so one stands after every fourth
# reduction; then all of them compile in 6 s.
FENCE_EVERY = 4
# a logit that softmax turns into zero
NO_WEIGHT = -1e30


def sample(
    b: GraphBuilder,
    logits: str,
    uniforms: str,
    temperature: str,
    top_k: str,
    top_p: str,
    codes: int,
) -> str:
    """Sample: logits [B, L, V], uniforms [B, L], scalars → tokens [B, L] int64."""
    with b.scope("sampler"):
        x = b.op("Div", logits, temperature)
        # one channel: totals over the codes can then go through a convolution as they are
        x = b.op("Unsqueeze", x, b.ints(1))  # [B, 1, L, V]
        top = b.op("ReduceMax", x, b.ints(-1), keepdims=1)  # [B, 1, L, 1]
        start, steps = _grid(b, x, top)
        low = _top_k_threshold(b, x, top, start, steps, top_k, codes)
        mass = b.op("Exp", b.op("Sub", x, top))  # [B, 1, L, V], unnormalised
        mass = _masked(b, b.op("GreaterOrEqual", x, low), mass)
        low = _top_p_threshold(b, x, mass, start, steps, top_p)
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


def _grid(b: GraphBuilder, x: str, top: str) -> tuple[str, list[str]]:
    """Return -2^e, below every logit, and the steps 2^e, 2^(e-1), …, all [B, 1, L, 1]."""
    bottom = b.op("ReduceMin", x, b.ints(-1), keepdims=1)
    zero = b.constant(0.0, np.float32)
    largest = b.op("Max", top, b.op("Sub", zero, bottom))
    powers = np.exp2(np.arange(-126, 128, dtype=np.float32))
    enough = b.op("Greater", b.constant(powers), largest)  # [B, 1, L, 254]
    above = b.op("Where", enough, b.constant(powers), b.constant(powers[-1]))
    power = b.op("ReduceMin", above, b.ints(-1), keepdims=1)
    fractions = b.constant(np.exp2(-np.arange(STEPS, dtype=np.float32)))
    steps = b.split(b.op("Mul", power, fractions), 3, [1] * STEPS)
    return b.op("Sub", zero, power), steps


def _total(b: GraphBuilder, x: str, turn: int) -> str:
    """Sum over the codes, [B, 1, L, 1]; a fence follows every few reductions (see
    `FENCE_EVERY`)."""
    total = b.op("ReduceSum", x, b.ints(-1), keepdims=1)
    if turn % FENCE_EVERY < FENCE_EVERY - 1:
        return total
    one = b.constant(np.ones((1, 1, 1, 1), np.float32))
    return b.op("Conv", total, one, kernel_shape=[1, 1], pads=[0, 0, 0, 0])


def _top_k_threshold(
    b: GraphBuilder, x: str, top: str, start: str, steps: Sequence[str], top_k: str, codes: int
) -> str:
    """Find the largest t [B, 1, L, 1] of the grid with at least k values ≥ t; k = 0 keeps all."""
    off = b.op("Equal", top_k, b.constant(0, np.int64))
    k = b.op("Where", off, b.constant(codes, np.int64), top_k)
    k = b.cast(b.op("Min", k, b.constant(codes, np.int64)), np.float32)

    def enough(threshold: str, turn: int = 0) -> str:
        above = b.cast(b.op("GreaterOrEqual", x, threshold), np.float32)
        return b.op("GreaterOrEqual", _total(b, above, turn), k)

    # a largest logit next to 0 may not be on the grid, so it is tried first: top-1 is exact
    low = b.op("Where", enough(top), top, start)
    for turn, step in enumerate(steps):
        higher = b.op("Add", low, step)
        low = b.op("Where", enough(higher, turn), higher, low)
    return low


def _top_p_threshold(
    b: GraphBuilder, x: str, mass: str, low: str, steps: Sequence[str], top_p: str
) -> str:
    """Find the largest t of the grid with mass(x ≤ t) ≤ 1 - p: the codes above t stay. p = 0 keeps
    all."""
    one, zero = b.constant(1.0, np.float32), b.constant(0.0, np.float32)
    off = b.op("Equal", top_p, zero)
    dropped = b.op("Where", off, zero, b.op("Sub", one, top_p))
    total = b.op("ReduceSum", mass, b.ints(-1), keepdims=1)
    limit = b.op("Mul", total, dropped)
    for turn, step in enumerate(steps):
        higher = b.op("Add", low, step)
        below = _masked(b, b.op("LessOrEqual", x, higher), mass)
        drop = b.op("LessOrEqual", _total(b, below, turn), limit)
        low = b.op("Where", drop, higher, low)
    return low


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
    total = b.op("ReduceMax", _masked(b, has_mass, cdf), b.ints(-2, -1), keepdims=1)
    target = b.op("Mul", b.op("Unsqueeze", uniforms, b.ints(-1, -2)), total)
    target = b.op("Min", target, b.op("Mul", total, b.constant(1 - 2.0**-23, np.float32)))
    beyond = b.op("And", has_mass, b.op("Greater", cdf, target))
    # the smallest index among them, counted from the end: ArgMax leaves ties to the backend
    order = np.arange(codes, codes - blocks * block, -1, dtype=np.float32).reshape(blocks, block)
    from_end = _masked(b, beyond, b.constant(order))
    most = b.op("ReduceMax", from_end, b.ints(-2, -1), keepdims=0)
    return b.cast(b.op("Sub", b.constant(float(codes), np.float32), most), np.int64)
