"""Transformer blocks as ONNX operators, on hidden states [L, G, C].

The sequence is the first axis because the new keys and values then are rows of the cache as they
come out of the projection, and the prefix of the cache is one contiguous piece of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.export.families import BlockContext, export_family_of
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.export.models.transformer import MAX_SCALE_LOG


def block(b: GraphBuilder, ctx: BlockContext, x: str, layer: int) -> str:
    """Add one block [L, G, C] → [L, G, C]; makes the values new_key and new_value of its layer."""
    t = ctx.spec.transformer
    family, prefix = export_family_of(t), f"blocks.{layer}"
    with b.scope(f"{prefix}.attn"):
        h = b.to_compute(family.norm(b, ctx, x, layer, 0))
        h = attention(b, ctx, h, layer)
        x = family.add_branch(b, ctx, x, h, layer, 0)
    with b.scope(f"{prefix}.ffn"):
        h = b.to_compute(family.norm(b, ctx, x, layer, 1))
        bias1 = b.weight(f"{prefix}.ffn.fc1.bias", (t.ffn_width,), dtype=b.compute)
        bias2 = b.weight(f"{prefix}.ffn.fc2.bias", (t.width,), dtype=b.compute)
        h = b.linear(h, f"{prefix}.ffn.fc1.weight", t.width, t.ffn_width, bias1)
        h = b.op("Gelu", h, approximate="tanh")
        h = b.linear(h, f"{prefix}.ffn.fc2.weight", t.ffn_width, t.width, bias2)
        return family.add_branch(b, ctx, x, h, layer, 1)


def attention(b: GraphBuilder, ctx: BlockContext, h: str, layer: int) -> str:
    """Add self-attention over the cache and this scale; every token sees all of them."""
    t = ctx.spec.transformer
    family, prefix = export_family_of(t), f"blocks.{layer}.attn"
    width, heads, head_width, rows = t.width, t.heads, t.head_width, ctx.rows
    bias = b.weight(f"{prefix}.qkv_bias", (3 * width,), family.qkv_bias(layer), b.compute)
    qkv = b.linear(h, family.qkv_key(layer), width, 3 * width, bias)  # [L, G, 3C]
    # reshape before the split: new keys and values are then graph outputs directly, without a copy
    qkv = b.reshape(qkv, -1, rows, 3 * heads, head_width)
    new_k, new_v = names.new_key(layer), names.new_value(layer)
    outs = (None, None if t.qk_l2_norm else new_k, new_v)
    q, k, v = b.split(qkv, 2, [heads] * 3, outs)  # [L, G, H, D]
    if t.qk_l2_norm:
        scale = b.weight(f"{prefix}.query_scale", (heads, 1), query_scale(prefix))
        q = b.to_compute(b.op("Mul", l2_normalize(b, b.to_float(q)), scale))
        k = l2_normalize(b, b.to_float(k), out=None if b.half else new_k)
        k = b.to_compute(k, out=new_k)
    elif t.attention_scale != 1.0:
        q = b.op("Mul", q, b.constant(t.attention_scale, b.compute))
    if ctx.past:
        k = b.op("Concat", names.past_key(layer), k, axis=0)
        v = b.op("Concat", names.past_value(layer), v, axis=0)
    q = b.transpose(q, 1, 2, 0, 3)  # [G, H, L, D]
    k = b.transpose(k, 1, 2, 3, 0)  # [G, H, D, P + L]
    v = b.transpose(v, 1, 2, 0, 3)  # [G, H, P + L, D]
    scores = b.to_float(b.op("MatMul", q, k))
    weights = b.to_compute(b.op("Softmax", scores, axis=-1))
    mixed = b.transpose(b.op("MatMul", weights, v), 2, 0, 1, 3)  # [L, G, H, D]
    if ctx.alone is not None:
        # attention of one token to itself alone is its own value; the placeholder is ignored:
        # exact, and cheaper than masking the scores of every scale
        mixed = b.op("Where", ctx.alone, new_v, mixed)
    proj_bias = b.weight(f"{prefix}.proj.bias", (width,), dtype=b.compute)
    return b.linear(
        b.reshape(mixed, -1, rows, width), f"{prefix}.proj.weight", width, width, proj_bias
    )


def l2_normalize(b: GraphBuilder, x: str, out: str | None = None) -> str:
    """x / max(|x|, 1e-12) over the last axis, in fp32: 1e-12 is 0 in fp16."""
    norm = b.op("ReduceL2", x, b.ints(-1), keepdims=1)
    return b.op("Div", x, b.op("Max", norm, b.constant(1e-12, np.float32)), out=out)


def query_scale(prefix: str) -> Callable[[ReadKey], NDArray[Any]]:
    """Return a function that makes exp(min(scale_mul, ln 100)), one factor per head."""

    def make(read: ReadKey) -> NDArray[Any]:
        learned = read(f"{prefix}.scale_mul_1H11").reshape(-1, 1)
        scale: NDArray[Any] = np.exp(np.minimum(learned, np.float32(MAX_SCALE_LOG)))
        return scale

    return make
