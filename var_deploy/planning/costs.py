"""Counts bytes and operations of each launch from the sizes of a model, without a bundle.

The formulas follow the graphs (docs/DESIGN.md) operator by operator; tests compare the bytes with
exported bundles, where they are equal. Notation as in `spec`. A multiply-add counts as two
operations. Models whose tokens are codes are counted here, text-to-image models in `text_costs`.
"""

from __future__ import annotations

import math

from var_deploy import names
from var_deploy.families import family_of
from var_deploy.planning import text_costs
from var_deploy.planning.autoencoder import (
    autoencoder_weights,
    decoder_layers,
    decoder_work,
    encoder_layers,
)
from var_deploy.planning.workload import FULL, Weights, Work, Workload, linear
from var_deploy.spec import ModelSpec, TextModelSpec

# One threshold for every bit, the least work of any width (a wide pass of the sampler tries more):
# top-k tries 34 with three operations per code (compare, convert, add), top-p 34 with four (and
# select); exponentials, masks and the search for the sampled code add about 20.
SAMPLER_OPERATIONS = 34 * (3 + 4) + 20
MIX_OPERATIONS = 10  # with more_smooth: noise, factors and a softmax per code


# weights


def graph_weights(workload: Workload, graph: str) -> Weights:
    """Weights of one graph by name; `batch` and `guidance` do not change them."""
    if isinstance(workload.model, TextModelSpec):
        return text_costs.graph_weights(workload, graph)
    w, model = workload, workload.codes
    if graph == names.CONDITION:
        return _condition_weights(w)
    if graph == names.DECODER:
        return autoencoder_weights(decoder_layers(model.tokenizer), w.precision)
    if graph == names.ENCODER:
        served = {model.tokenizer.phi_index(k) for k in range(model.scales - 1)}
        used = len(served) if model.tokenizer.phi_count else 0
        layers = encoder_layers(model.tokenizer)
        return autoencoder_weights(layers, w.precision) + _codebook(model) + _phi(model, used)
    if graph == names.ACCUMULATE:
        served = {model.tokenizer.phi_index(k) for k in range(model.scales)}
        return _codebook(model) + _phi(model, len(served) if model.tokenizer.phi_count else 0)
    if graph == names.STEP:
        return _scale_weights(w, first=True, later=True, phis=model.tokenizer.phi_count)
    scale = workload.scale_graphs.index(graph)
    feeds = scale + 1 < model.scales
    used = min(model.tokenizer.phi_count, 1)
    return _scale_weights(w, first=scale == 0, later=scale > 0, phis=used, feeds=feeds)


def bundle_weights(workload: Workload) -> int:
    """Bytes of all weights of one precision, each once; weights.bin adds padding to pages."""
    if isinstance(workload.model, TextModelSpec):
        return text_costs.bundle_weights(workload).nbytes(workload.itemsize)
    model = workload.codes
    graphs = [names.STEP, names.DECODER]
    if model.transformer.conditional:
        graphs.append(names.CONDITION)
    # the other weights of the encoder are those of step
    weights = autoencoder_weights(encoder_layers(model.tokenizer), workload.precision)
    for graph in graphs:
        weights += graph_weights(workload, graph)
    return weights.nbytes(workload.itemsize)

def _condition_weights(w: Workload) -> Weights:
    t = w.codes.transformer
    table = (t.classes + 1) * t.width
    offsets = 6 * t.width * t.depth if t.shared_adaln else 0
    own = Weights(full=table + t.width + offsets, tables=table)
    adaln = linear(t.width, 6 * t.width, w.precision) * (1 if t.shared_adaln else t.depth)
    return own + adaln + linear(t.width, 2 * t.width, w.precision)


def _block_weights(w: Workload) -> Weights:
    t = w.codes.transformer
    norms = 2 * family_of(t).norm_weights(t)
    c, ffn = t.width, t.ffn_width
    sizes = ((c, 3 * c), (c, c), (c, ffn), (ffn, c))
    matrices = (linear(before, after, w.precision) for before, after in sizes)
    return sum(matrices, Weights(full=norms + (t.heads if t.qk_l2_norm else 0)))


def _scale_weights(
    w: Workload, *, first: bool, later: bool, phis: int, feeds: bool = True
) -> Weights:
    """Weights of a scale graph. `first`: it serves scale 0; `later`: it serves other scales."""
    model, t, vocab = w.codes, w.codes.transformer, w.codes.tokenizer.vocab_size
    family = family_of(t)
    full = t.width * vocab + vocab + family.norm_weights(t)  # the head
    if later:
        full += family.embed_weights(model)
    if first:
        full += family.first_weights(model)
    tables = (model.total_tokens + model.scales) * t.width if later else 0
    if feeds:
        tables += family.next_tables(model)
    own = _block_weights(w) * t.depth + Weights(full=full + tables, tables=tables)
    return own + _codebook(model) + _phi(model, phis)


def _codebook(model: ModelSpec) -> Weights:
    """Weights of the codebooks; all of them are in the graph where each scale has its own."""
    t = model.tokenizer
    size = t.vocab_size * t.code_width * (model.scales if t.codebook_per_scale else 1)
    return Weights(full=size, tables=size)


def _phi(model: ModelSpec, count: int) -> Weights:
    width = model.tokenizer.code_width
    return Weights(full=count * (9 * width * width + width))

# work


def launches(workload: Workload, itemsize: int | None = None) -> list[Work]:
    """The launches of one generation of B images, in order.

    `itemsize`: bytes per weight of `Weights.compute` as the device reads them, where the device
    converts weights; None for the bytes of the graph's precision.
    """
    size = itemsize or workload.itemsize
    if isinstance(workload.model, TextModelSpec):
        return text_costs.launches(workload, size)
    found = [_scale_work(workload, k, size) for k in range(workload.model.scales)]
    if workload.model.transformer.conditional:
        found.insert(0, _condition_work(workload, size))
    return [*found, decoder_work(workload, size)]


def _condition_work(w: Workload, itemsize: int) -> Work:
    t = w.codes.transformer
    weights = _condition_weights(w)
    outputs = (6 * t.depth + 2 + 1) * w.rows * t.width * FULL
    return Work(
        name=names.CONDITION,
        compute_operations=2 * w.rows * weights.compute,
        full_operations=0,
        traffic=weights.read(itemsize) + outputs,
    )


def _scale_work(w: Workload, scale: int, itemsize: int) -> Work:
    """Work of a scale. Head, codes and sampling are fp32; in int8 graphs so is attention."""
    model, t, tok = w.codes, w.codes.transformer, w.codes.tokenizer
    length, past = model.scale_lengths[scale], model.prefix_lengths[scale]
    weights = graph_weights(w, names.scale_graph(scale))
    compute = 2 * w.rows * length * weights.compute
    attended = 4 * length * (past + length) * t.width * t.depth * w.rows
    patch, side, vocab = model.patch_nums[scale], tok.latent_side, tok.vocab_size
    full = 2 * w.rows * length * t.width * vocab
    full += w.batch * length * vocab * (SAMPLER_OPERATIONS + 2 * math.isqrt(vocab))
    noise = w.batch * length * vocab if w.more_smooth else 0
    full += noise * (MIX_OPERATIONS + 2 * tok.code_width)
    mixing = noise and (noise + vocab * tok.code_width) * FULL  # the whole codebook, not a few rows
    full += 2 * w.batch * tok.code_width * (side * patch * patch + side * side * patch)
    if tok.phi_count:
        full += 2 * w.batch * 9 * tok.code_width**2 * side**2
    if scale:
        full += family_of(t).embed_operations(model, w.batch * length)
    rows = past if scale + 1 == model.scales else past + length  # cache read and written
    cache = 2 * t.depth * rows * w.rows * t.width * w.cache_itemsize
    f_hats = 2 * w.batch * tok.code_width * side**2 * FULL
    modulation = family_of(t).modulation_rows(t) * w.rows * t.width * FULL
    if w.precision == "int8":
        full, attended = full + attended, 0
    return Work(
        name=names.scale_graph(scale),
        compute_operations=compute + attended,
        full_operations=full,
        traffic=weights.read(itemsize) + cache + f_hats + modulation + mixing,
    )
