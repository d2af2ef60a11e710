"""The scale graphs: one launch turns the previous scales into tokens, f_hat and the next input.

`build_scale` makes the static graph of one scale; `build_step` makes the same computation with
symbolic L and P, given as inputs what a static graph holds as constants. Both are the one body
below over a `Geometry`, so they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.families import BlockContext, export_family_of
from var_deploy.export.graphs.blocks import block
from var_deploy.export.graphs.builder import GraphBuilder, Shape
from var_deploy.export.graphs.quantizer import DynamicCodes, Mix, StaticCodes
from var_deploy.export.graphs.sampler import mix, sample
from var_deploy.families import family_of
from var_deploy.names import LENGTH, NEXT_LENGTH, NEXT_SIDE, PAST, SIDE
from var_deploy.sampling import smoothing
from var_deploy.spec import ModelSpec


class Codes(Protocol):
    """The operations around the tokens in which a static scale graph and `step` differ."""

    def of_scale(self, values: Sequence[float]) -> str: ...
    def add(self, tokens: str, f_hat: str, mix: Mix | None = None) -> None: ...
    def next_input(self, tokens: str) -> None: ...


def build_scale(spec: ModelSpec, scale: int, form: GraphForm) -> GraphBuilder:
    """Build the static graph of one scale; scale 0 has no past and reads `first_input`."""
    b, family = GraphBuilder(names.scale_graph(scale), form), export_family_of(spec.transformer)
    length, past = spec.scale_lengths[scale], spec.prefix_lengths[scale]
    last = scale == spec.scales - 1
    if scale == 0:
        x = family.first_hidden(b, spec, form)
    else:
        embedded = family.embed(b, spec, _input(b, spec, length))
        position = b.op(
            "Slice", _positions(b, spec), b.ints(past), b.ints(past + length), b.ints(0)
        )
        level = b.op("Slice", _levels(b, spec), b.ints(scale), b.ints(scale + 1), b.ints(0))
        x = _place(b, embedded, b.op("Add", position, level))
    _body(b, spec, x, StaticCodes(b, spec, scale), Span(length=length, past=past, last=last))
    if not last:
        following = spec.scale_lengths[scale + 1]
        b.output(names.NEXT_INPUT, np.float32, (form.batch, following, spec.input_width))
    return b


def build_step(spec: ModelSpec, form: GraphForm) -> GraphBuilder:
    """Build the one graph that serves every scale, over the same weights, with L and P left
    open."""
    b, family = GraphBuilder(names.STEP, form), export_family_of(spec.transformer)
    side = spec.tokenizer.latent_side
    scale = b.input(names.SCALE, np.int64, ())
    b.input(names.UP_MATRIX, np.float32, (side, SIDE))
    from_tokens = not family_of(spec.transformer).mixes_codes
    source = SIDE if from_tokens else side
    b.input(names.NEXT_MATRIX, np.float32, (NEXT_SIDE, source))
    embedded = family.embed(b, spec, _input(b, spec, LENGTH))
    # the rows of this scale start after the past; its length is that of the input. At scale 0,
    # where the past is a placeholder, what comes out is not used
    start = b.op("Shape", names.past_key(0), start=0, end=1)
    if spec.scales == 1:  # there is no row behind the placeholder: not one row would be left
        start = b.ints(0)
    stop = b.op("Add", start, b.op("Shape", names.INPUT, start=1, end=2))
    position = b.op("Slice", _positions(b, spec), start, stop, b.ints(0))
    level = b.op("Gather", _levels(b, spec), scale, axis=0)
    placed = _place(b, embedded, b.op("Add", position, level))
    first = family.first_hidden(b, spec, form)
    alone = b.op("Equal", scale, b.constant(0, np.int64))
    x = b.op("Where", alone, first, placed)
    span = Span(length=LENGTH, past=PAST, last=False, alone=alone)
    _body(b, spec, x, DynamicCodes(b, spec, scale), span)
    b.output(names.NEXT_INPUT, np.float32, (form.batch, NEXT_LENGTH, spec.input_width))
    return b


@dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens that a scale graph computes.

    Attributes:
        length: L, a number or a symbol.
        past: P, the tokens before them.
        last: nothing is computed for a next scale.
        alone: see `BlockContext`.
    """

    length: int | str
    past: int | str
    last: bool
    alone: str | None = None


def _body(b: GraphBuilder, spec: ModelSpec, x: str, codes: Codes, span: Span) -> None:
    """Add blocks, head, guidance, sampling, f_hat and the next input to a graph. x is [L, G, C]."""
    t, form = spec.transformer, b.form
    length, batch, rows, last = span.length, form.batch, form.rows, span.last
    modulation = export_family_of(t).modulation(b, spec, form)
    ctx = BlockContext(
        spec=spec, rows=rows, modulation=modulation, past=span.past != 0, alone=span.alone
    )
    cache_row = (rows, t.heads, t.head_width)
    if ctx.past:
        for layer in range(t.depth):
            b.input(names.past_key(layer), b.compute, (span.past, *cache_row))
            b.input(names.past_value(layer), b.compute, (span.past, *cache_row))
    f_hat_shape = (batch, spec.tokenizer.code_width, *[spec.tokenizer.latent_side] * 2)
    f_hat = b.input(names.F_HAT, np.float32, f_hat_shape)
    tokens_shape: Shape = (batch, length)
    uniforms = b.input(names.UNIFORMS, np.float32, tokens_shape)
    cfg = b.input(names.CFG, np.float32, ()) if form.guidance else None
    temperature = b.input(names.TEMPERATURE, np.float32, ())
    top_k = b.input(names.TOP_K, np.int64, ())
    top_p = b.input(names.TOP_P, np.float32, ())
    keep_mask = b.input(names.KEEP_MASK, np.bool_, tokens_shape)
    keep_tokens = b.input(names.KEEP_TOKENS, np.int64, tokens_shape)
    vocab = spec.tokenizer.vocab_size
    noise = b.input(names.NOISE, np.float32, (*tokens_shape, vocab)) if form.more_smooth else None

    for layer in range(t.depth):
        x = block(b, ctx, x, layer)
    _logits(b, ctx, x, cfg)
    longest = length if isinstance(length, int) else max(spec.scale_lengths)
    filters = (temperature, top_k, top_p)
    sampled = sample(b, names.LOGITS, uniforms, *filters, length=longest, codes=vocab)
    tokens = b.op("Where", keep_mask, keep_tokens, sampled, out=names.TOKENS)
    # where the logits are not numbers the sampler gives V: the host sees that, and a look-up past
    # the table would be an invalid address on a GPU
    known = b.op("Min", tokens, b.constant(vocab - 1, np.int64))
    mixed = None
    if noise is not None:
        factors, taus = zip(*(smoothing(k, spec.scales) for k in range(spec.scales)), strict=True)
        factor, tau = codes.of_scale(factors), codes.of_scale(taus)
        weights = mix(b, names.LOGITS, names.KEPT_MASS, noise, temperature, factor, tau)
        mixed = Mix(weights=weights, keep=keep_mask)
    codes.add(known, f_hat, mixed)
    if not last:
        codes.next_input(known)

    b.output(names.TOKENS, np.int64, tokens_shape)
    b.output(names.NEW_F_HAT, np.float32, f_hat_shape)
    if not last:
        for layer in range(t.depth):
            b.output(names.new_key(layer), b.compute, (length, *cache_row))
            b.output(names.new_value(layer), b.compute, (length, *cache_row))


def _logits(b: GraphBuilder, ctx: BlockContext, x: str, cfg: str | None) -> None:
    """Add the head in fp32 and guidance: makes the value LOGITS [B, L, V]."""
    t, vocab = ctx.spec.transformer, ctx.spec.tokenizer.vocab_size
    with b.scope("head"):
        h = export_family_of(t).head_norm(b, ctx, x)
        h = b.transpose(h, 1, 0, 2)  # [G, L, C]
        bias = b.weight("head.bias", (vocab,))
        logits = b.linear(h, "head.weight", t.width, vocab, bias, full=True)
        if cfg is None:
            b.op("Identity", logits, out=names.LOGITS)
            return
        conditional, unconditional = b.split(logits, 0, [b.form.batch] * 2)
        strong = b.op("Mul", conditional, b.op("Add", cfg, b.constant(1.0, np.float32)))
        b.op("Sub", strong, b.op("Mul", unconditional, cfg), out=names.LOGITS)


def _input(b: GraphBuilder, spec: ModelSpec, length: int | str) -> str:
    return b.input(names.INPUT, np.float32, (b.form.batch, length, spec.input_width))


def _positions(b: GraphBuilder, spec: ModelSpec) -> str:
    key = export_family_of(spec.transformer).positions_key
    return b.weight(key, (spec.total_tokens, spec.transformer.width))


def _levels(b: GraphBuilder, spec: ModelSpec) -> str:
    key = export_family_of(spec.transformer).levels_key
    return b.weight(key, (spec.scales, spec.transformer.width))


def _place(b: GraphBuilder, embedded: str, position: str) -> str:
    """Add [L, C] positions to [L, B, C], then repeat for the unconditional rows: [L, G, C]."""
    x = b.op("Add", embedded, b.op("Unsqueeze", position, b.ints(1)))
    return b.op("Concat", x, x, axis=1) if b.form.guidance else x
