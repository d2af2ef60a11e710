"""Counts bytes and operations of the launches of a text-to-image model, and of its text encoder.

Notation as in `spec`; Hp are the heads of the attention pool.
"""

from __future__ import annotations

import math

from var_deploy import names
from var_deploy.config import Precision
from var_deploy.planning.autoencoder import (
    autoencoder_weights,
    decoder_layers,
    decoder_work,
    encoder_layers,
)
from var_deploy.planning.workload import (
    FULL,
    Weights,
    Work,
    Workload,
    itemsize_of,
    linear,
    unrounded,
)
from var_deploy.spec import Grid, TextEncoderSpec

# of a bit: a sigmoid each for 0 and 1, thresholds, comparisons, and the code
BIT_OPERATIONS = 20


def graph_weights(w: Workload, graph: str) -> Weights:
    """Weights of one graph by name; `batch` and `guidance` do not change them."""
    tokenizer = w.text.tokenizer
    if graph == names.CONDITION:
        return _condition_weights(w) + pooled_weights(w)
    if graph == names.UNCONDITIONAL:
        return _no_prompt_weights(w) + pooled_weights(w)
    if graph == names.DECODER:
        return autoencoder_weights(decoder_layers(tokenizer), w.precision)
    if graph == names.ENCODER:
        return autoencoder_weights(encoder_layers(tokenizer), w.precision)
    if graph == names.ACCUMULATE:
        return Weights()
    if graph == names.STEP:
        return _scale_weights(w, later=True)
    return _scale_weights(w, later=w.scale_graphs.index(graph) > 0)


def bundle_weights(w: Workload) -> Weights:
    """All weights of one precision, each once."""
    own = (names.STEP, names.DECODER, names.ENCODER)
    weights = sum((graph_weights(w, graph) for graph in own), _condition_weights(w))
    if w.guidance:
        weights += _no_prompt_weights(w)
    return weights + pooled_weights(w)


def pooled_weights(w: Workload) -> Weights:
    """Weights that `condition` and `unconditional` share: the pool, and what is made of its
    result."""
    t, p = w.text.transformer, w.precision
    values = unrounded(t.text_width * t.width + t.width, p)
    pool = values + linear(t.width, t.width, p, full=p == "int8")
    modulation = linear(t.width, 6 * t.width, p) + linear(t.width, 2 * t.width, p)
    return pool + modulation + Weights(full=t.width + 6 * t.depth * t.width)


def _condition_weights(w: Workload) -> Weights:
    """Weights of `condition` alone: the text's projections, to keys and values of every block."""
    t, p = w.text.transformer, w.precision
    first = Weights(full=t.text_width + t.text_width * t.pool_heads)
    text = linear(t.text_width, t.width, p) + linear(t.width, t.width, p)
    return first + text + linear(t.width, 2 * t.width, p) * t.depth


def _no_prompt_weights(w: Workload) -> Weights:
    """Weights of `unconditional` alone: features, scores, and keys and values of "no prompt"."""
    t = w.text.transformer
    kept = unrounded(2 * t.depth * t.width * t.text_length, w.precision)
    return kept + Weights(full=t.text_length * (t.text_width + t.pool_heads))


def _block_weights(w: Workload) -> Weights:
    t, p = w.text.transformer, w.precision
    c, ffn = t.width, t.ffn_width
    # self-attention, cross-attention (its keys and values are those of `condition`), feed-forward
    sizes = ((c, 3 * c), (c, c), (c, c), (c, c), (c, ffn), (ffn, c))
    matrices = (linear(before, after, p) for before, after in sizes)
    return sum(matrices, Weights(full=2 * c + t.heads))  # a norm, and the factors on queries


def _scale_weights(w: Workload, *, later: bool) -> Weights:
    """Weights of a scale graph; `later`: it serves other scales than the first."""
    model, t = w.text, w.text.transformer
    bits = model.tokenizer.token_bits
    weights = _block_weights(w) * t.depth + Weights(full=t.width * bits + bits)  # the head
    if later:
        levels = model.scales * t.width
        weights += Weights(full=levels + bits * t.width, tables=levels)
    return weights


# work


def launches(w: Workload, itemsize: int) -> list[Work]:
    """The launches of one generation of B images, in order; `itemsize` as in `costs.launches`."""
    conditions = [_condition_work(w, itemsize)]
    if w.guidance:
        conditions.append(_unconditional_work(w, itemsize))
    scales = [_scale_work(w, k, itemsize) for k in range(w.text.scales)]
    return [*conditions, *scales, decoder_work(w, itemsize)]


def _work(w: Workload, name: str, compute: int, full: int, unround: int, traffic: int) -> Work:
    """Make a `Work`; the products `unround` follow the precision, but are fp32 in int8 graphs."""
    if w.precision == "int8":
        full += unround
    else:
        compute += unround
    return Work(name=name, compute_operations=compute, full_operations=full, traffic=traffic)


def _pool_operations(w: Workload) -> tuple[int, int, int]:
    """Products of the pool and the modulation: (rounded in int8, fp32, fp32 in int8 alone)."""
    t = w.text.transformer
    modulation = 2 * w.batch * 8 * t.width**2
    mixing = 2 * w.batch * t.pool_heads * t.text_length * t.text_width
    return modulation, mixing, 2 * w.batch * (t.text_width + t.width) * t.width


def _condition_outputs(w: Workload) -> int:
    """Bytes that a condition graph writes: half of the rows where there is guidance."""
    t = w.text.transformer
    texts = 2 * t.depth * w.batch * t.width * t.text_length * w.cache_itemsize
    return texts + (6 * t.depth + 3) * w.batch * t.width * FULL


def _condition_work(w: Workload, itemsize: int) -> Work:
    t = w.text.transformer
    tokens = w.batch * t.text_length
    modulation, mixing, pool = _pool_operations(w)
    projections = t.text_width * t.width + t.width**2 + 2 * t.depth * t.width**2
    scores = 2 * tokens * t.text_width * t.pool_heads
    features = tokens * t.text_width * FULL
    traffic = graph_weights(w, names.CONDITION).read(itemsize) + features + _condition_outputs(w)
    compute = modulation + 2 * tokens * projections
    return _work(w, names.CONDITION, compute, mixing + scores, pool, traffic)


def _unconditional_work(w: Workload, itemsize: int) -> Work:
    weights = graph_weights(w, names.UNCONDITIONAL).read(itemsize)
    return _work(w, names.UNCONDITIONAL, *_pool_operations(w), weights + _condition_outputs(w))


def _scale_work(w: Workload, scale: int, itemsize: int) -> Work:
    """Work of a scale. Embedding, head, sampling and f_hat are fp32; in int8 graphs so is
    attention."""
    model, t, tok = w.text, w.text.transformer, w.text.tokenizer
    length, past = model.scale_lengths[scale], model.prefix_lengths[scale]
    last = scale + 1 == model.scales
    rows, c = w.rows * length, t.width
    products = 2 * rows * t.depth * c * (6 * c + 2 * t.ffn_width)
    attention = 4 * rows * (past + length + t.text_length) * c * t.depth
    full = 2 * rows * c * tok.token_bits + w.batch * length * tok.token_bits * BIT_OPERATIONS
    if scale:
        full += 2 * w.batch * length * tok.token_bits * c
    resized = _resizing(tok.latent_grids[scale], tok.latent_grid)
    if not last:
        resized += _resizing(tok.latent_grid, tok.latent_grids[scale + 1])
    full += 2 * w.batch * tok.bits * resized
    kept = past if last else past + length  # cache read and written
    cache = 2 * t.depth * (kept + t.text_length) * w.rows * c * w.cache_itemsize
    f_hats = 2 * w.batch * tok.bits * math.prod(tok.latent_grid) * FULL
    modulation = (6 * t.depth + 2) * w.rows * c * FULL
    name = names.scale_graph(scale)
    traffic = graph_weights(w, name).read(itemsize) + cache + f_hats + modulation
    return _work(w, name, products, full, attention, traffic)


def _resizing(source: Grid, target: Grid) -> int:
    """Multiply-adds per channel to resize maps: rows first, then columns; 0 where nothing
    changes."""
    if source == target:
        return 0
    return target[0] * source[0] * source[1] + target[0] * source[1] * target[1]


# the text encoder


def text_encoder_weights(spec: TextEncoderSpec, precision: Precision) -> Weights:
    """Weights of the graph `text_encoder`."""
    width, inner, ffn = spec.width, spec.heads * spec.head_width, spec.ffn_width
    block = Weights(full=2 * width)
    for before, after in (*3 * [(width, inner)], (inner, width), *2 * [(width, ffn)]):
        block += linear(before, after, precision, bias=False)
    block += linear(ffn, width, precision, bias=False, full=True)
    biases = spec.buckets * spec.heads + spec.length**2  # by distance, and which distance is where
    own = Weights(full=biases + width)
    return unrounded(spec.vocab_size * width, precision) + block * spec.depth + own


def text_encoder_work(
    spec: TextEncoderSpec, precision: Precision, itemsize: int | None = None
) -> Work:
    """Work of one prompt, which is padded to the graph's length; `itemsize` as in
    `costs.launches`."""
    size = itemsize or itemsize_of(precision)
    width, inner = spec.width, spec.heads * spec.head_width
    ffn, length = spec.ffn_width, spec.length
    products = 2 * length * spec.depth * (4 * width * inner + 2 * width * ffn)
    attention = 4 * length**2 * inner * spec.depth
    full = 2 * length * spec.depth * ffn * width
    if precision == "int8":
        full, attention = full + attention, 0
    table = unrounded(spec.vocab_size * width, precision)
    weights = text_encoder_weights(spec, precision).nbytes(size) - table.nbytes(size)
    return Work(
        name=names.TEXT_ENCODER,
        compute_operations=products + attention,
        full_operations=full,
        traffic=weights + 2 * length * width * FULL,
    )
