"""The scale graphs of a text-to-image model: bits of one scale, f_hat and the next input.

As in `graphs/scale.py`, `build_text_scale` makes the static graph of one scale and
`build_text_step` the same computation with symbolic L and P; both are one body over a `Place`.
Hidden states are [L, G, C], keys and values rows of the cache.

Channels of queries and keys are permuted within each head, so that the two members of a rotated
pair are D/2 apart instead of neighbours: the same products, without a shuffle in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.config import LARGEST_SCORES, GraphForm
from var_deploy.export.graphs.bits import BitMaps, DynamicMaps, StaticMaps
from var_deploy.export.graphs.blocks import l2_normalize, query_scale
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.export.graphs.text_condition import additive_mask, biased_linear
from var_deploy.rope import rope_tables
from var_deploy.spec import TextModelSpec

LARGEST_LOGIT = 3e38  # beyond it a logit overflowed


@dataclass(frozen=True, kw_only=True)
class Place:
    """The scale that a graph computes.

    Attributes:
        length, past: L and P, numbers or symbols.
        most: (L, P + L) that attention must be cut for.
        last: nothing is computed for a next scale.
        cos, sin: values [L, 1, 1, D/2] of the rotation.
        mask: value to add to the scores of the text, [G, 1, 1, S].
        alone: a bool value that is true at scale 0 of `step`, see `graphs/blocks.py`; else None.
    """

    length: int | str
    past: int | str
    most: tuple[int, int]
    last: bool
    cos: str
    sin: str
    mask: str
    alone: str | None = None


def build_text_scale(spec: TextModelSpec, scale: int, form: GraphForm) -> GraphBuilder:
    """Build the static graph of one scale; scale 0 has no past and reads `first_input`."""
    t, b = spec.transformer, GraphBuilder(names.scale_graph(scale), form)
    length, past = spec.scale_lengths[scale], spec.prefix_lengths[scale]
    last = scale == spec.scales - 1
    if scale == 0:
        x = _first(b, spec)
    else:
        level = b.op("Slice", _levels(b, spec), b.ints(scale), b.ints(scale + 1), b.ints(0))
        x = _placed(b, spec, length, level)
    modulation, mask = _condition(b, spec)
    cos, sin = (
        b.constant(table[:, None, None])
        for table in rope_tables(spec.grids[scale], t.rope_grid, t.head_width)
    )
    place = Place(
        length=length,
        past=past,
        most=(length, past + length),
        last=last,
        cos=cos,
        sin=sin,
        mask=mask,
    )
    _body(b, spec, x, modulation, StaticMaps(b, spec.tokenizer, scale), place)
    if not last:
        following = spec.scale_lengths[scale + 1]
        b.output(names.NEXT_INPUT, np.float32, (form.batch, following, spec.input_width))
    return b


def build_text_step(spec: TextModelSpec, form: GraphForm) -> GraphBuilder:
    """Build the one graph that serves every scale, over the same weights."""
    t, b = spec.transformer, GraphBuilder(names.STEP, form)
    scale = b.input(names.SCALE, np.int64, ())
    maps = DynamicMaps(b, spec.tokenizer)
    half = (names.LENGTH, t.head_width // 2)
    cos, sin = (
        b.op("Unsqueeze", b.input(name, np.float32, half), b.ints(1, 2))
        for name in (names.ROPE_COS, names.ROPE_SIN)
    )
    level = b.op("Gather", _levels(b, spec), b.op("Unsqueeze", scale, b.ints(0)), axis=0)
    placed = _placed(b, spec, names.LENGTH, level)
    alone = b.op("Equal", scale, b.constant(0, np.int64))
    x = b.op("Where", alone, _first(b, spec), placed)
    modulation, mask = _condition(b, spec)
    place = Place(
        length=names.LENGTH,
        past=names.PAST,
        most=(spec.scale_lengths[-1], spec.total_tokens),
        last=False,
        cos=cos,
        sin=sin,
        mask=mask,
        alone=alone,
    )
    _body(b, spec, x, modulation, maps, place)
    following = (form.batch, names.NEXT_LENGTH, spec.input_width)
    b.output(names.NEXT_INPUT, np.float32, following)
    return b


def _first(b: GraphBuilder, spec: TextModelSpec) -> str:
    shape = (b.form.rows, 1, spec.transformer.width)
    return b.transpose(b.input(names.FIRST_INPUT, np.float32, shape), 1, 0, 2)


def _levels(b: GraphBuilder, spec: TextModelSpec) -> str:
    """Level embedding and the bias of the word embedding, [K, C]."""

    def make(read: ReadKey) -> NDArray[Any]:
        total: NDArray[Any] = read("lvl_embed.weight")[: spec.scales] + read("word_embed.bias")
        return total

    return b.weight("levels", (spec.scales, spec.transformer.width), make)


def _placed(b: GraphBuilder, spec: TextModelSpec, length: int | str, level: str) -> str:
    """Embed the input [B, L, e] and repeat it for the unconditional rows: [L, G, C], in fp32."""
    given = b.input(names.INPUT, np.float32, (b.form.batch, length, spec.input_width))
    x = b.transpose(given, 1, 0, 2)
    width = spec.transformer.width
    x = b.linear(x, "word_embed.weight", spec.input_width, width, None, full=True)
    x = b.op("Add", x, level)
    return b.op("Concat", x, x, axis=1) if b.form.guidance else x


def _condition(b: GraphBuilder, spec: TextModelSpec) -> tuple[str, str]:
    """Declare what the condition graphs made; return the modulation [6N + 2, G, C] and the mask."""
    t, rows = spec.transformer, b.form.rows
    table = b.input(names.MODULATION, np.float32, (rows, 6 * t.depth + 2, t.width))
    mask = b.input(names.TEXT_MASK, np.bool_, (rows, t.text_length))
    for layer in range(t.depth):
        key, value = (rows, t.heads, t.head_width), (rows, t.heads, t.text_length)
        b.input(names.text_key(layer), b.compute, (*key, t.text_length))
        b.input(names.text_value(layer), b.compute, (*value, t.head_width))
    return b.transpose(table, 1, 0, 2), additive_mask(b, mask)


def _body(
    b: GraphBuilder, spec: TextModelSpec, x: str, modulation: str, maps: BitMaps, place: Place
) -> None:
    """Add blocks, head, guidance, sampling, f_hat and the next input to a graph. x is [L, G, C]."""
    t, tok, form = spec.transformer, spec.tokenizer, b.form
    length, cache_row = place.length, (form.rows, t.heads, t.head_width)
    if place.past != 0:
        for layer in range(t.depth):
            b.input(names.past_key(layer), b.compute, (place.past, *cache_row))
            b.input(names.past_value(layer), b.compute, (place.past, *cache_row))
    f_hat_shape = (form.batch, tok.bits, *tok.latent_grid)
    f_hat = b.input(names.F_HAT, np.float32, f_hat_shape)
    bits_shape = (form.batch, length, tok.token_bits)
    uniforms = b.input(names.UNIFORMS, np.float32, bits_shape)
    cfg = b.input(names.CFG, np.float32, ()) if form.guidance else None
    temperature = b.input(names.TEMPERATURE, np.float32, ())
    top_p = b.input(names.TOP_P, np.float32, ())
    keep_mask = b.input(names.KEEP_MASK, np.bool_, (form.batch, length))
    keep_bits = b.input(names.KEEP_TOKENS, np.int64, bits_shape)

    for layer in range(t.depth):
        x = _block(b, spec, x, modulation, layer, place)
    _logits(b, spec, x, modulation, cfg)
    drawn = draw_bits(b, names.LOGITS, uniforms, temperature, top_p)
    forced = b.op("Unsqueeze", keep_mask, b.ints(-1))
    bits = b.op("Where", forced, keep_bits, drawn, out=names.TOKENS)
    maps.add(bits, f_hat)
    if not place.last:
        maps.next_input()

    b.output(names.TOKENS, np.int64, bits_shape)
    b.output(names.NEW_F_HAT, np.float32, f_hat_shape)
    if not place.last:
        for layer in range(t.depth):
            b.output(names.new_key(layer), b.compute, (length, *cache_row))
            b.output(names.new_value(layer), b.compute, (length, *cache_row))


def _block(
    b: GraphBuilder, spec: TextModelSpec, x: str, modulation: str, layer: int, place: Place
) -> str:
    """Add self-attention, cross-attention and feed-forward: [L, G, C] → [L, G, C], in fp32 between
    them."""
    t, prefix = spec.transformer, f"blocks.{layer}"
    rows = [b.gather_row(modulation, 6 * layer + n) for n in range(6)]
    gamma1, gamma2, scale1, scale2, shift1, shift2 = rows
    with b.scope(f"{prefix}.sa"):
        h = b.to_compute(_modulated(b, spec, x, scale1, shift1))
        h = _self_attention(b, spec, h, layer, place)
        x = b.op("Add", x, b.op("Mul", b.to_float(h), gamma1))
    with b.scope(f"{prefix}.ca"):
        h = b.op(
            "LayerNormalization",
            x,
            b.weight(f"{prefix}.ca_norm.weight", (t.width,)),
            b.weight(f"{prefix}.ca_norm.bias", (t.width,)),
            axis=-1,
            epsilon=t.norm_eps,
        )
        h = _cross_attention(b, spec, b.to_compute(h), layer, place)
        x = b.op("Add", x, b.to_float(h))
    with b.scope(f"{prefix}.ffn"):
        h = b.to_compute(_modulated(b, spec, x, scale2, shift2))
        h = biased_linear(b, f"{prefix}.ffn.fc1", h, t.width, t.ffn_width)
        h = b.op("Gelu", h, approximate="tanh")
        h = biased_linear(b, f"{prefix}.ffn.fc2", h, t.ffn_width, t.width)
        return b.op("Add", x, b.op("Mul", b.to_float(h), gamma2))


def _self_attention(b: GraphBuilder, spec: TextModelSpec, h: str, layer: int, place: Place) -> str:
    t, prefix, rows = spec.transformer, f"blocks.{layer}.sa", b.form.rows
    order = paired_halves(t.heads, t.head_width)
    bias = b.weight(f"{prefix}.qkv_bias", (3 * t.width,), _qkv_bias(prefix, order), b.compute)
    qkv = b.linear(
        h,
        f"{prefix}.mat_qkv.weight",
        t.width,
        3 * t.width,
        bias,
        rows=lambda weight: _reordered(weight, order),
    )
    qkv = b.reshape(qkv, -1, rows, 3 * t.heads, t.head_width)
    new_k, new_v = names.new_key(layer), names.new_value(layer)
    q, k, v = b.split(qkv, 2, [t.heads] * 3, (None, None, new_v))  # [L, G, H, D]
    scale = b.weight(f"{prefix}.query_scale", (t.heads, 1), query_scale(prefix))
    q = b.op("Mul", l2_normalize(b, b.to_float(q)), scale)
    q = b.to_compute(_rotate(b, q, place, t.head_width))
    k = _rotate(b, l2_normalize(b, b.to_float(k)), place, t.head_width, None if b.half else new_k)
    k = b.to_compute(k, out=new_k)
    if place.past != 0:
        k = b.op("Concat", names.past_key(layer), k, axis=0)
        v = b.op("Concat", names.past_value(layer), v, axis=0)
    mixed = attend(
        b,
        b.transpose(q, 1, 2, 0, 3),  # [G, H, L, D]
        b.transpose(k, 1, 2, 3, 0),  # [G, H, D, P + L]
        b.transpose(v, 1, 2, 0, 3),  # [G, H, P + L, D]
        (rows, t.heads, *place.most),
    )
    mixed = b.transpose(mixed, 2, 0, 1, 3)  # [L, G, H, D]
    if place.alone is not None:
        mixed = b.op("Where", place.alone, new_v, mixed)  # see `graphs/blocks.py`
    return biased_linear(b, f"{prefix}.proj", b.reshape(mixed, -1, rows, t.width), t.width, t.width)


def _cross_attention(b: GraphBuilder, spec: TextModelSpec, h: str, layer: int, place: Place) -> str:
    t, prefix, rows = spec.transformer, f"blocks.{layer}.ca", b.form.rows
    q = biased_linear(b, f"{prefix}.mat_q", h, t.width, t.width)
    q = b.op("Mul", q, b.constant(t.head_width**-0.5, b.compute))
    q = b.transpose(b.reshape(q, -1, rows, t.heads, t.head_width), 1, 2, 0, 3)
    sizes = (rows, t.heads, place.most[0], t.text_length)
    mixed = attend(b, q, names.text_key(layer), names.text_value(layer), sizes, place.mask)
    mixed = b.reshape(b.transpose(mixed, 2, 0, 1, 3), -1, rows, t.width)
    return biased_linear(b, f"{prefix}.proj", mixed, t.width, t.width)


def attend(
    b: GraphBuilder,
    q: str,
    k: str,
    v: str,
    sizes: tuple[int, int, int, int],
    mask: str | None = None,
) -> str:
    """Add softmax(q · k + mask) · v over [rows, heads, L, D], with the softmax in fp32.

    `sizes` are rows, heads, queries and keys at most. Where the scores of all heads would need more
    than LARGEST_SCORES bytes, heads are done in groups, one after the other, which is exact and
    works for open sizes as well; rows are cut where even one head is too much.
    """
    rows, heads, queries, keys = sizes
    one = 4 * queries * keys  # bytes of the scores of one head of one row
    together = max(1, min(heads, LARGEST_SCORES // (one * rows)))
    apart = [1] * rows if one * rows > LARGEST_SCORES else [rows]
    groups = [min(together, heads - first) for first in range(0, heads, together)]

    def cut(x: str, axis: int, parts: list[int]) -> list[str]:
        return [x] if len(parts) == 1 else b.split(x, axis, parts)

    def piece(q: str, k: str, v: str, mask: str | None) -> str:
        scores = b.to_float(b.op("MatMul", q, k))
        if mask is not None:
            scores = b.op("Add", scores, mask)
        return b.op("MatMul", b.to_compute(b.op("Softmax", scores, axis=-1)), v)

    done = []
    masks = cut(mask, 0, apart) if mask is not None else [None] * len(apart)
    parts = zip(*(cut(x, 0, apart) for x in (q, k, v)), masks, strict=True)
    for q_row, k_row, v_row, mask_row in parts:
        pieces = zip(*(cut(x, 1, groups) for x in (q_row, k_row, v_row)), strict=True)
        mixed = [piece(qh, kh, vh, mask_row) for qh, kh, vh in pieces]
        done.append(mixed[0] if len(mixed) == 1 else b.op("Concat", *mixed, axis=1))
    return done[0] if len(done) == 1 else b.op("Concat", *done, axis=0)


def draw_bits(b: GraphBuilder, logits: str, uniforms: str, temperature: str, top_p: str) -> str:
    """Draw bits: logits [B, L, e] of bit 1 over bit 0, uniforms [B, L, e] → int64 [B, L, e].

    The likelier of the two values stays, and the other where its probability is above 1 - top_p;
    at a tie bit 1 counts as the likelier. top_p 0 keeps both. A bit is 1 where the uniform is not
    below the probability of 0. A logit that is not a number gives 2, which the host refuses.
    """
    with b.scope("sampler"):
        zero, one = b.constant(0.0, np.float32), b.constant(1.0, np.float32)
        x = b.op("Div", logits, temperature)
        p1 = b.op("Sigmoid", x)
        p0 = b.op("Sigmoid", b.op("Sub", zero, x))
        off = b.op("Equal", top_p, zero)
        least = b.op("Where", off, b.constant(-1.0, np.float32), b.op("Sub", one, top_p))
        keep1 = b.op("Or", b.op("GreaterOrEqual", x, zero), b.op("Greater", p1, least))
        keep0 = b.op("Or", b.op("Greater", zero, x), b.op("Greater", p0, least))
        limit = b.op("Where", keep0, b.op("Where", keep1, p0, one), zero)
        bits = b.cast(b.op("GreaterOrEqual", uniforms, limit), np.int64)
        low, high = (b.constant(n, np.float32) for n in (-LARGEST_LOGIT, LARGEST_LOGIT))
        number = b.op("And", b.op("Greater", x, low), b.op("Greater", high, x))
        return b.op("Where", number, bits, b.constant(2, np.int64))


def _logits(b: GraphBuilder, spec: TextModelSpec, x: str, modulation: str, cfg: str | None) -> None:
    """Add the head in fp32 and guidance: makes LOGITS [B, L, e], bit 1 over bit 0.

    Only the difference of a bit's two logits counts, so the head is the difference of its rows.
    """
    t, bits = spec.transformer, spec.tokenizer.token_bits
    with b.scope("head"):
        scale, shift = (b.gather_row(modulation, 6 * t.depth + n) for n in range(2))
        h = b.transpose(_modulated(b, spec, x, scale, shift), 1, 0, 2)  # [G, L, C]
        weight = b.weight(
            "head.difference",
            (t.width, bits),
            lambda read: _difference(read("head.weight")).T,
        )
        bias = b.weight(
            "head.difference_bias", (bits,), lambda read: _difference(read("head.bias"))
        )
        logits = b.op("Add", b.op("MatMul", h, weight), bias)
        if cfg is None:
            b.op("Identity", logits, out=names.LOGITS)
            return
        conditional, unconditional = b.split(logits, 0, [b.form.batch] * 2)
        # cfg · c + (1 - cfg) · u; at cfg 1 exactly the conditional rows
        away = b.op("Sub", cfg, b.constant(1.0, np.float32))
        strong = b.op("Mul", conditional, cfg)
        b.op("Sub", strong, b.op("Mul", unconditional, away), out=names.LOGITS)


def _modulated(b: GraphBuilder, spec: TextModelSpec, x: str, scale: str, shift: str) -> str:
    """Add LN(x) · scale + shift in fp32; the table holds 1 + scale."""
    ones = b.constant(np.ones(spec.transformer.width, np.float32))
    h = b.op("LayerNormalization", x, ones, axis=-1, epsilon=spec.transformer.norm_eps)
    return b.op("Add", b.op("Mul", h, scale), shift)


def _rotate(b: GraphBuilder, x: str, place: Place, head_width: int, out: str | None = None) -> str:
    """Add the rotation of [L, G, H, D] in fp32; the members of a pair are D/2 apart."""
    first, second = b.split(x, 3, [head_width // 2] * 2)
    turned = (
        b.op("Sub", b.op("Mul", first, place.cos), b.op("Mul", second, place.sin)),
        b.op("Add", b.op("Mul", first, place.sin), b.op("Mul", second, place.cos)),
    )
    return b.op("Concat", *turned, axis=3, out=out)


def paired_halves(heads: int, head_width: int) -> NDArray[np.int64]:
    """Order of the C channels of all heads that puts the first members of a head's pairs before the
    second ones: 0, 2, 4, …, 1, 3, 5, … within each head."""
    one = np.concatenate([np.arange(0, head_width, 2), np.arange(1, head_width, 2)])
    order: NDArray[np.int64] = (np.arange(heads)[:, None] * head_width + one).reshape(-1)
    return order


def _reordered(rows: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    """Reorder the first two thirds of the rows [3C, …]: queries and keys."""
    width = len(order)
    found: NDArray[Any] = np.concatenate(
        [rows[:width][order], rows[width : 2 * width][order], rows[2 * width :]]
    )
    return found


def _qkv_bias(prefix: str, order: NDArray[np.int64]) -> Callable[[ReadKey], NDArray[Any]]:
    def make(read: ReadKey) -> NDArray[Any]:
        q, v = read(f"{prefix}.q_bias"), read(f"{prefix}.v_bias")
        return np.concatenate([q[order], np.zeros_like(q), v])  # there is none on the keys

    return make


def _difference(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows of bit 1 minus rows of bit 0, of [2e, …] with the two of a bit side by side."""
    found: NDArray[Any] = rows[1::2] - rows[::2]
    return found
