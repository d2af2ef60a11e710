"""The graphs `condition` and `unconditional` of a text-to-image model: text features to all that
the scales read of them, once per prompt (Infinity, arXiv 2412.04431).

Both make rows for B images: the first input [B, 1, C], the modulation [B, 6N + 2, C] in the order
of `graphs/condition.py`, and the keys and values of the text for the cross attention of the blocks.
A runtime binds the outputs of `condition` to the first half of the G rows, and those of
`unconditional`, or of a second launch of `condition` with a negative prompt, to the second half.

The features of "no prompt" are trained constants, and keys and values are computed token by token.
So `unconditional` holds those as weights; only the pooled text depends on the prompt's length.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.export.graphs.norms import rms_norm
from var_deploy.spec import TextModelSpec

DROPPED = -1e30  # added to the score of a position that is not text: its weight is exactly 0
POOL = "text_proj_for_sos.ca"

Table = Callable[[ReadKey], NDArray[np.float32]]


def build_text_condition(spec: TextModelSpec, form: GraphForm) -> GraphBuilder:
    """Build `condition`: features [B, S, Ct] and mask [B, S] of B prompts → rows of B images."""
    t, b = spec.transformer, _builder(names.CONDITION, form)
    features = b.input(names.TEXT_FEATURES, np.float32, (form.batch, t.text_length, t.text_width))
    mask = b.input(names.TEXT_MASK, np.bool_, (form.batch, t.text_length))
    with b.scope("text"):
        text = rms_norm(b, features, "text_norm.weight", t.text_width, t.norm_eps)  # [B, S, Ct]
        scores = b.weight(f"{POOL}.scores", (t.text_width, t.pool_heads), _pool_scores(spec))
        cond = _pool(b, spec, text, b.op("MatMul", text, scores), mask)
        tokens = b.to_compute(b.transpose(text, 1, 0, 2))  # [S, B, Ct]
        h = biased_linear(b, "text_proj_for_ca.0", tokens, t.text_width, t.width)
        h = b.op("Gelu", h, approximate="tanh")
        h = biased_linear(b, "text_proj_for_ca.2", h, t.width, t.width)
    for layer in range(t.depth):
        with b.scope(f"blocks.{layer}.ca"):
            prefix = f"blocks.{layer}.ca"
            bias = b.weight(f"{prefix}.kv_bias", (2 * t.width,), _kv_bias(layer), b.compute)
            kv = b.linear(h, f"{prefix}.mat_kv.weight", t.width, 2 * t.width, bias)
            kv = b.reshape(b.to_compute(kv) if b.rounded else kv, -1, form.batch, 2, *_heads(spec))
            key, value = b.split(kv, 2, [1, 1])  # [S, B, 1, H, D]
            key = b.reshape(key, -1, form.batch, *_heads(spec))
            value = b.reshape(value, -1, form.batch, *_heads(spec))
            b.op("Transpose", key, perm=[1, 2, 3, 0], out=names.text_key(layer))
            b.op("Transpose", value, perm=[1, 2, 0, 3], out=names.text_value(layer))
    _finish(b, spec, cond)
    return b


def build_unconditional(spec: TextModelSpec, form: GraphForm) -> GraphBuilder:
    """Build `unconditional`: the mask [B, S] of B prompts → the rows of B images without a prompt.

    The features of "no prompt" count for as many tokens as the prompt of the image has.
    """
    t, b = spec.transformer, _builder(names.UNCONDITIONAL, form)
    mask = b.input(names.TEXT_MASK, np.bool_, (form.batch, t.text_length))
    heads, width = _heads(spec)
    text, projected = _no_prompt(spec)
    with b.scope("text"):
        table = b.weight("no_prompt", (1, t.text_length, t.text_width), text)
        scores = b.weight(
            f"{POOL}.no_prompt_scores",
            (1, t.text_length, t.pool_heads),
            lambda read: _product(text(read), _pool_scores(spec)(read)),
        )
        cond = _pool(b, spec, table, scores, mask)

    def rows(layer: int, part: int, perm: tuple[int, ...]) -> Table:
        def make(read: ReadKey) -> NDArray[np.float32]:
            weight = read(f"blocks.{layer}.ca.mat_kv.weight").reshape(2, t.width, t.width)[part]
            bias = _kv_bias(layer)(read).reshape(2, t.width)[part]
            made = _product(projected(read), weight.T) + bias
            made = made.reshape(t.text_length, heads, width)
            moved: NDArray[np.float32] = made.transpose(perm)
            return moved

        return make

    for layer in range(t.depth):
        with b.scope(f"blocks.{layer}.ca"):
            prefix = f"blocks.{layer}.ca.no_prompt"
            for name, part, perm, shape in (
                (names.text_key(layer), 0, (1, 2, 0), (heads, width, t.text_length)),
                (names.text_value(layer), 1, (1, 0, 2), (heads, t.text_length, width)),
            ):
                kind = "key" if part == 0 else "value"
                one = b.weight(f"{prefix}_{kind}", (1, *shape), rows(layer, part, perm), b.compute)
                b.op("Expand", one, b.ints(form.batch, *shape), out=name)
    _finish(b, spec, cond)
    return b


def additive_mask(b: GraphBuilder, mask: str) -> str:
    """Return fp32 [rows, 1, 1, S] to add to scores: 0 at the text, a huge negative beyond it."""
    zero, dropped = b.constant(0.0, np.float32), b.constant(DROPPED, np.float32)
    return b.op("Unsqueeze", b.op("Where", mask, zero, dropped), b.ints(1, 2))


def _builder(name: str, form: GraphForm) -> GraphBuilder:
    # rows of one half: the graph makes B of the G rows
    return GraphBuilder(name, dataclasses.replace(form, guidance=False))


def _heads(spec: TextModelSpec) -> tuple[int, int]:
    return spec.transformer.heads, spec.transformer.head_width


def biased_linear(b: GraphBuilder, key: str, x: str, width_in: int, width_out: int) -> str:
    """Add x [..., B, in] → [..., B, out] in the compute type, with the checkpoint's bias."""
    bias = b.weight(f"{key}.bias", (width_out,), dtype=b.compute)
    return b.linear(x, f"{key}.weight", width_in, width_out, bias)


def _pool(b: GraphBuilder, spec: TextModelSpec, text: str, scores: str, mask: str) -> str:
    """Add the attention pool: text [B or 1, S, Ct], scores [B or 1, S, Hp] → cond [B, C] fp32.

    The query is a parameter, so query and key projection are one matrix [Ct, Hp]; the weights of a
    head add up to 1, so the value projection follows the sum over the tokens, and is done once
    instead of for each token. Both are exact but for rounding.
    """
    t, batch = spec.transformer, b.form.batch
    width = t.width // t.pool_heads
    scores = b.transpose(scores, 0, 2, 1)  # [·, Hp, S]
    masked = b.op("Add", scores, b.op("Squeeze", additive_mask(b, mask), b.ints(1)))
    weights = b.op("Softmax", masked, axis=-1)  # [B, Hp, S]
    pooled = b.to_compute(b.op("MatMul", weights, text))  # [B, Hp, Ct]
    pooled = b.reshape(pooled, batch, t.pool_heads, 1, t.text_width)
    values = b.weight(
        f"{POOL}.values", (t.pool_heads, t.text_width, width), _pool_values(spec), b.compute
    )
    h = b.reshape(b.op("MatMul", pooled, values), batch, t.width)
    h = b.op("Add", h, b.weight(f"{POOL}.v_bias", (t.width,), dtype=b.compute))
    bias = b.weight(f"{POOL}.proj.bias", (t.width,), dtype=b.compute)
    # one row: in an int8 graph it stays fp32, since all that depends on the text follows from it
    full = b.rounded
    return b.to_float(b.linear(h, f"{POOL}.proj.weight", t.width, t.width, bias, full=full))


def _finish(b: GraphBuilder, spec: TextModelSpec, cond: str) -> None:
    """Add first input and modulation, and declare the outputs."""
    t, batch = spec.transformer, b.form.batch
    first = b.op("Add", cond, b.weight("first_position", (t.width,), _first_position))
    b.op("Reshape", first, b.ints(batch, 1, t.width), out=names.FIRST_INPUT)
    x = b.to_compute(b.silu(cond))
    with b.scope("modulation"):
        shared = b.to_float(biased_linear(b, "shared_ada_lin.1", x, t.width, 6 * t.width))
        own = b.weight("ada_gss", (t.depth, 6, t.width), _own_modulation(t.depth))
        blocks = b.op("Add", b.reshape(shared, batch, 1, 6, t.width), own)
        head = b.to_float(biased_linear(b, "head_nm.ada_lin.1", x, t.width, 2 * t.width))
        head = b.op(
            "Add",
            b.reshape(head, batch, 2, t.width),
            b.constant(np.array([[1.0], [0.0]], np.float32)),
        )
        blocks = b.reshape(blocks, batch, 6 * t.depth, t.width)
        b.op("Concat", blocks, head, axis=1, out=names.MODULATION)
    heads, width = _heads(spec)
    b.output(names.FIRST_INPUT, np.float32, (batch, 1, t.width))
    b.output(names.MODULATION, np.float32, (batch, 6 * t.depth + 2, t.width))
    for layer in range(t.depth):
        b.output(names.text_key(layer), b.compute, (batch, heads, width, t.text_length))
        b.output(names.text_value(layer), b.compute, (batch, heads, t.text_length, width))


# what weights are made of


def _first_position(read: ReadKey) -> NDArray[Any]:
    total: NDArray[Any] = read("pos_start").reshape(-1) + read("lvl_embed.weight")[0]
    return total


def _own_modulation(depth: int) -> Table:
    def make(read: ReadKey) -> NDArray[np.float32]:
        own = np.stack([read(f"blocks.{n}.ada_gss").reshape(6, -1) for n in range(depth)])
        own[:, 2:4] += np.float32(1)  # the table holds 1 + scale
        return own

    return make


def _product(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a · b in fp32, summed in fp64: sums in fp32 differ in their last digits from one
    processor or number of threads to another, and so would the bytes of a bundle."""
    made: NDArray[np.float32] = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    return made


def _kv_bias(layer: int) -> Table:
    def make(read: ReadKey) -> NDArray[np.float32]:
        values = read(f"blocks.{layer}.ca.v_bias")
        return np.concatenate([np.zeros_like(values), values])  # there is none on the keys

    return make


def _pool_scores(spec: TextModelSpec) -> Table:
    """[Ct, Hp]: the query times the key projection, over sqrt(Dp)."""
    t = spec.transformer
    width = t.width // t.pool_heads

    def make(read: ReadKey) -> NDArray[np.float32]:
        keys = read(f"{POOL}.mat_kv.weight")[: t.width].reshape(t.pool_heads, width, -1)
        query = read(f"{POOL}.mat_q").reshape(t.pool_heads, width)
        scores = [_product(keys[head].T, query[head]) for head in range(t.pool_heads)]
        made: NDArray[np.float32] = np.stack(scores, axis=1) / np.float32(math.sqrt(width))
        return made

    return make


def _pool_values(spec: TextModelSpec) -> Table:
    """[Hp, Ct, Dp]: the value projection of each head."""
    t = spec.transformer

    def make(read: ReadKey) -> NDArray[np.float32]:
        values = read(f"{POOL}.mat_kv.weight")[t.width :]
        made: NDArray[np.float32] = values.reshape(t.pool_heads, -1, t.text_width).transpose(
            0, 2, 1
        )
        return made

    return make


def _no_prompt(spec: TextModelSpec) -> tuple[Table, Table]:
    """Normalised features [S, Ct] of "no prompt", and their projection [S, C] for the keys and
    values, each computed once."""
    t = spec.transformer

    @functools.cache
    def text(read: ReadKey) -> NDArray[np.float32]:
        x = read("cfg_uncond")[: t.text_length].astype(np.float64)
        root = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + t.norm_eps)
        normalised: NDArray[np.float32] = (x / root * read("text_norm.weight")).astype(np.float32)
        return normalised

    @functools.cache
    def projected(read: ReadKey) -> NDArray[np.float32]:
        key = "text_proj_for_ca"
        x = _product(text(read), read(f"{key}.0.weight").T) + read(f"{key}.0.bias")
        wide = x.astype(np.float64)
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        x = (0.5 * wide * (1 + np.tanh(inner))).astype(np.float32)
        made = _product(x, read(f"{key}.2.weight").T) + read(f"{key}.2.bias")
        return made

    return text, projected
