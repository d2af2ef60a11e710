"""Samples tokens inside the graph: top-k, top-p, inverse CDF; and mixes codes in more-smooth
graphs.

No sort and no TopK (TensorRT's takes at most 3840): both filters keep the logits above a threshold,
and the threshold is found by bisection, counting (top-k) or weighing (top-p) the logits above the
middle of an interval. k and p are run-time scalars. Equal logits at the top-k threshold all stay,
as in the published code; at the top-p threshold too, where the published code drops some of them in
an order that its sort leaves open. The cumulative sum is two small triangular products, because
CumSum becomes a loop in TensorRT before 10.8.
"""

from __future__ import annotations

import math

import numpy as np

from var_deploy import names
from var_deploy.export.graphs.builder import GraphBuilder

# Thirty-two bisections narrow the interval to 2^-32 of the logits' range, below the spacing of fp32
# numbers of that size: two logits that still fall together are equal for all that fp32 can tell.
HALVINGS = 32
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
        top = b.op("ReduceMax", x, b.ints(-1), keepdims=1)  # [B, L, 1]
        low = _top_k_threshold(b, x, top, top_k, codes)
        zero = b.constant(0.0, np.float32)
        mass = b.op("Exp", b.op("Sub", x, top))  # [B, L, V], unnormalised
        mass = b.op("Where", b.op("GreaterOrEqual", x, low), mass, zero)
        low = _top_p_threshold(b, x, top, mass, low, top_p)
        # the largest always stays, also where p is too small for 1 - p to differ from 1
        kept = b.op("Or", b.op("Greater", x, low), b.op("GreaterOrEqual", x, top))
        mass = b.op("Where", kept, mass, zero, out=names.KEPT_MASS)
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


def _middle(b: GraphBuilder, low: str, high: str) -> str:
    return b.op("Mul", b.op("Add", low, high), b.constant(0.5, np.float32))


def _total(b: GraphBuilder, x: str, turn: int) -> str:
    """Sum over the codes, [B, L, 1]; a fence follows every few reductions (see `FENCE_EVERY`)."""
    total = b.op("ReduceSum", x, b.ints(-1), keepdims=1)
    if turn % FENCE_EVERY < FENCE_EVERY - 1:
        return total
    one = b.constant(np.ones((1, 1, 1), np.float32))
    row = b.transpose(total, 0, 2, 1)
    fenced = b.op("Conv", row, one, kernel_shape=[1], pads=[0, 0])
    return b.transpose(fenced, 0, 2, 1)


def _top_k_threshold(b: GraphBuilder, x: str, top: str, top_k: str, codes: int) -> str:
    """Find the largest t [B, L, 1] (to the last bisection) with at least k values ≥ t; k = 0 keeps
    all."""
    off = b.op("Equal", top_k, b.constant(0, np.int64))
    k = b.op("Where", off, b.constant(codes, np.int64), top_k)
    k = b.cast(b.op("Min", k, b.constant(codes, np.int64)), np.float32)

    def enough(threshold: str, turn: int = 0) -> str:
        above = b.cast(b.op("GreaterOrEqual", x, threshold), np.float32)
        return b.op("GreaterOrEqual", _total(b, above, turn), k)

    # bisection never arrives at its upper end, so the largest is tried first: top-1 is exact
    low = b.op("Where", enough(top), top, b.op("ReduceMin", x, b.ints(-1), keepdims=1))
    high = top
    for turn in range(HALVINGS):
        middle = _middle(b, low, high)
        holds = enough(middle, turn)
        low = b.op("Where", holds, middle, low)
        high = b.op("Where", holds, high, middle)
    return low


def _top_p_threshold(b: GraphBuilder, x: str, top: str, mass: str, low: str, top_p: str) -> str:
    """Find the largest t with mass(x ≤ t) ≤ 1 - p: the codes above t stay. p = 0 keeps all."""
    one, zero = b.constant(1.0, np.float32), b.constant(0.0, np.float32)
    off = b.op("Equal", top_p, zero)
    dropped = b.op("Where", off, zero, b.op("Sub", one, top_p))
    total = b.op("ReduceSum", mass, b.ints(-1), keepdims=1)
    limit = b.op("Mul", total, dropped)
    # starts below the lowest kept logit: with p off or 1 nothing may be dropped
    low = b.op("Sub", low, one)
    high = top
    for turn in range(HALVINGS):
        middle = _middle(b, low, high)
        below = b.op("Where", b.op("Greater", x, middle), zero, mass)
        weight = _total(b, below, turn)
        drop = b.op("LessOrEqual", weight, limit)
        low = b.op("Where", drop, middle, low)
        high = b.op("Where", drop, high, middle)
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
    total = b.op("ReduceMax", b.op("Where", has_mass, cdf, zero), b.ints(-2, -1), keepdims=1)
    target = b.op("Mul", b.op("Unsqueeze", uniforms, b.ints(-1, -2)), total)
    target = b.op("Min", target, b.op("Mul", total, b.constant(1 - 2.0**-23, np.float32)))
    beyond = b.op("And", has_mass, b.op("Greater", cdf, target))
    # the smallest index among them, by a minimum: ArgMax leaves ties to the backend
    index = b.constant(np.arange(blocks * block, dtype=np.float32).reshape(blocks, block))
    candidates = b.op("Where", beyond, index, b.constant(float(codes), np.float32))
    return b.cast(b.op("ReduceMin", candidates, b.ints(-2, -1), keepdims=0), np.int64)
