"""Counts bytes and operations of each launch from the sizes of a model, without a bundle.

The formulas follow the graphs (docs/DESIGN.md) operator by operator; tests compare the bytes with
exported bundles, where they are equal. Notation as in `spec`. A multiply-add counts as two
operations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from var_deploy import names
from var_deploy.config import Precision
from var_deploy.families import family_of
from var_deploy.manifest import Manifest
from var_deploy.spec import ModelSpec, TokenizerSpec

FULL = 4  # bytes of an fp32 or int32 number
# Top-k tries 34 thresholds with three operations per code (compare, convert, add), top-p 34 with
# four (and select); exponentials, masks and the search for the sampled code add about 20.
SAMPLER_OPERATIONS = 34 * (3 + 4) + 20
MIX_OPERATIONS = 10  # with more_smooth: noise, factors and a softmax per code


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with batch, guidance and precision: all inputs of a cost besides the device."""

    model: ModelSpec
    batch: int = 1
    guidance: bool = True
    precision: Precision = "fp16"
    more_smooth: bool = False

    @property
    def rows(self) -> int:
        """G, the rows of a batch: 2·B with guidance, else B."""
        return 2 * self.batch if self.guidance else self.batch

    @property
    def itemsize(self) -> int:
        """Bytes per weight that is stored in the graph's precision."""
        return {"fp32": FULL, "fp16": 2, "int8": 1}[self.precision]

    @property
    def cache_itemsize(self) -> int:
        """Bytes per number in the cache and other intermediates; int8 graphs use fp32 there."""
        return 2 if self.precision == "fp16" else FULL

    @property
    def scale_graphs(self) -> tuple[str, ...]:
        """Names of the static graphs of all scales."""
        return tuple(names.scale_graph(k) for k in range(self.model.scales))


def workload_of(manifest: Manifest, precision: Precision) -> Workload:
    """The workload of a bundle in a precision."""
    return Workload(
        model=manifest.code_model("plan"),
        batch=manifest.of(precision).batch,
        guidance=manifest.guidance,
        precision=precision,
        more_smooth=manifest.more_smooth,
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Number of weights of a graph in weights.bin.

    Attributes:
        compute: weights in the graph's precision; in int8, only matrices and kernels.
        full: weights of four bytes in every precision: fp32, and the int32 biases of int8.
        tables: part of `full` that are lookup tables, of which a launch reads a few rows.
    """

    compute: int = 0
    full: int = 0
    tables: int = 0

    def nbytes(self, itemsize: int) -> int:
        """Size in bytes, as `weight_bytes` in the manifest."""
        return self.compute * itemsize + self.full * FULL

    def read(self, itemsize: int) -> int:
        """Bytes that every launch reads: all weights except lookup tables."""
        return self.nbytes(itemsize) - self.tables * FULL

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            compute=self.compute + other.compute,
            full=self.full + other.full,
            tables=self.tables + other.tables,
        )

    def __mul__(self, count: int) -> Weights:
        return Weights(
            compute=count * self.compute, full=count * self.full, tables=count * self.tables
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and memory traffic of one launch.

    Attributes:
        name: name of the static graph.
        compute_operations: operations in the graph's precision; in int8, products of int8 numbers.
        full_operations: operations in fp32, in every precision.
        traffic: least bytes that are read and written: weights, cache, inputs, outputs.
    """

    name: str
    compute_operations: int
    full_operations: int
    traffic: int


# weights


def graph_weights(workload: Workload, graph: str) -> Weights:
    """Weights of one graph by name; `batch` and `guidance` do not change them."""
    w, model = workload, workload.model
    if graph == names.CONDITION:
        return _condition_weights(w)
    if graph == names.DECODER:
        return _autoencoder_weights(decoder_layers(model.tokenizer), w.precision)
    if graph == names.ENCODER:
        served = {model.tokenizer.phi_index(k) for k in range(model.scales - 1)}
        used = len(served) if model.tokenizer.phi_count else 0
        layers = encoder_layers(model.tokenizer)
        return _autoencoder_weights(layers, w.precision) + _codebook(model) + _phi(model, used)
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
    model = workload.model
    graphs = [names.STEP, names.DECODER]
    if model.transformer.conditional:
        graphs.append(names.CONDITION)
    # the other weights of the encoder are those of step
    weights = _autoencoder_weights(encoder_layers(model.tokenizer), workload.precision)
    for graph in graphs:
        weights += graph_weights(workload, graph)
    return weights.nbytes(workload.itemsize)


def _linear(before: int, after: int, precision: Precision) -> Weights:
    """A matrix and its bias; int8 stores the bias in fp32, and one scale per column."""
    if precision == "int8":
        return Weights(compute=before * after, full=2 * after)
    return Weights(compute=before * after + after)


def _condition_weights(w: Workload) -> Weights:
    t = w.model.transformer
    table = (t.classes + 1) * t.width
    offsets = 6 * t.width * t.depth if t.shared_adaln else 0
    own = Weights(full=table + t.width + offsets, tables=table)
    adaln = _linear(t.width, 6 * t.width, w.precision) * (1 if t.shared_adaln else t.depth)
    return own + adaln + _linear(t.width, 2 * t.width, w.precision)


def _block_weights(w: Workload) -> Weights:
    t = w.model.transformer
    norms = 2 * family_of(t).norm_weights(t)
    c, ffn = t.width, t.ffn_width
    sizes = ((c, 3 * c), (c, c), (c, ffn), (ffn, c))
    matrices = (_linear(before, after, w.precision) for before, after in sizes)
    return sum(matrices, Weights(full=norms + (t.heads if t.qk_l2_norm else 0)))


def _scale_weights(
    w: Workload, *, first: bool, later: bool, phis: int, feeds: bool = True
) -> Weights:
    """Weights of a scale graph. `first`: it serves scale 0; `later`: it serves other scales."""
    model, t, vocab = w.model, w.model.transformer, w.model.tokenizer.vocab_size
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


# the autoencoder


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the autoencoder, on square feature maps.

    Attributes:
        side: side of its output.
        kernel: side of the convolution's kernel; 0 for other layers.
        doubled: the convolution follows nearest up-sampling. In fp32 and int8 it runs before it, as
            a 2×2 convolution for each of the four phases.
        rounded: it is int8 in an int8 graph, not fp32. Up-samplings count as int8, although
            calibration may leave some in fp32.
    """

    kind: Literal["conv", "norm", "mix"]
    before: int
    after: int
    side: int
    kernel: int = 0
    doubled: bool = False
    rounded: bool = False

    def weights(self, precision: Precision) -> Weights:
        if self.kind != "conv":
            return Weights(full=2 * self.after if self.kind == "norm" else 0)
        phases = 4 if self.doubled and precision != "fp16" else 1
        kernels = phases * self._taps(precision) * self.before * self.after
        if precision != "int8":
            return Weights(compute=kernels + self.after)
        if self.rounded:  # with a scale and a bias for each kernel of each phase
            return Weights(compute=kernels, full=2 * phases * self.after)
        return Weights(full=kernels + self.after)

    def operations(self, precision: Precision) -> int:
        """Operations per image; only products count."""
        positions = self.side**2
        if self.kind == "conv":
            return 2 * self._taps(precision) * self.before * self.after * positions
        return 4 * self.after * positions**2 if self.kind == "mix" else 0

    def _taps(self, precision: Precision) -> int:
        return 4 if self.doubled and precision != "fp16" else self.kernel**2


def _conv(before: int, after: int, side: int, kernel: int = 3) -> Layer:
    return Layer(kind="conv", before=before, after=after, side=side, kernel=kernel)


def _norm(channels: int, side: int) -> Layer:
    return Layer(kind="norm", before=channels, after=channels, side=side)


def _residual(before: int, after: int, side: int) -> Iterator[Layer]:
    yield from (_norm(before, side), _conv(before, after, side))
    yield from (_norm(after, side), _conv(after, after, side))
    if before != after:
        yield _conv(before, after, side, 1)


def _attention(channels: int, side: int) -> Iterator[Layer]:
    yield from (_norm(channels, side), _conv(channels, 3 * channels, side, 1))
    yield Layer(kind="mix", before=channels, after=channels, side=side)
    yield _conv(channels, channels, side, 1)


def _middle(channels: int, side: int) -> Iterator[Layer]:
    yield from _residual(channels, channels, side)
    yield from _attention(channels, side)
    yield from _residual(channels, channels, side)


def _level(before: int, after: int, blocks: int, side: int, lowest: bool) -> Iterator[Layer]:
    for number in range(blocks):
        yield from _residual(after if number else before, after, side)
        if lowest:
            yield from _attention(after, side)


def decoder_layers(spec: TokenizerSpec) -> list[Layer]:
    """Layers of the decoder (f_hat → image), as in docs/DESIGN.md."""
    widths = [spec.base_width * m for m in spec.width_multipliers]
    side, top = spec.latent_side, len(widths) - 1
    first = [_conv(spec.code_width, spec.code_width, side)]
    first.append(_conv(spec.code_width, widths[-1], side))
    layers = list(_middle(widths[-1], side))
    for i in range(top, -1, -1):
        coming, lowest = widths[min(i + 1, top)], side == spec.latent_side
        layers += _level(coming, widths[i], spec.res_blocks + 1, side, lowest)
        if i:
            side *= 2
            after = _conv(widths[i], widths[i], side)
            layers.append(dataclasses.replace(after, doubled=True))
    rounded = [dataclasses.replace(layer, rounded=layer.kernel == 3) for layer in layers]
    last = [_norm(widths[0], side), _conv(widths[0], spec.image_channels, side)]
    return [*first, *rounded, *last]


def encoder_layers(spec: TokenizerSpec) -> list[Layer]:
    """Layers of the encoder (image → latent)."""
    widths = [spec.base_width * m for m in spec.width_multipliers]
    side, coming = spec.image_side, spec.base_width
    layers = [_conv(spec.image_channels, spec.base_width, side)]
    for i, width in enumerate(widths):
        layers += _level(coming, width, spec.res_blocks, side, side == spec.latent_side)
        if i + 1 < len(widths):
            side //= 2
            layers.append(_conv(width, width, side))
        coming = width
    layers += [*_middle(coming, side), _norm(coming, side), _conv(coming, spec.code_width, side)]
    return [*layers, _conv(spec.code_width, spec.code_width, side)]


def _autoencoder_weights(layers: list[Layer], precision: Precision) -> Weights:
    return sum((layer.weights(precision) for layer in layers), Weights())


# work


def launches(workload: Workload, itemsize: int | None = None) -> list[Work]:
    """The launches of one generation of B images, in order.

    `itemsize`: bytes per weight of `Weights.compute` as the device reads them, where the device
    converts weights; None for the bytes of the graph's precision.
    """
    size = itemsize or workload.itemsize
    found = [_scale_work(workload, k, size) for k in range(workload.model.scales)]
    if workload.model.transformer.conditional:
        found.insert(0, _condition_work(workload, size))
    return [*found, _decoder_work(workload, size)]


def _condition_work(w: Workload, itemsize: int) -> Work:
    t = w.model.transformer
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
    model, t, tok = w.model, w.model.transformer, w.model.tokenizer
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


def _decoder_work(w: Workload, itemsize: int) -> Work:
    tok = w.model.tokenizer
    layers = decoder_layers(tok)
    image = tok.image_side**2 * tok.image_channels + tok.code_width * tok.latent_side**2
    compute = full = 0
    for layer in layers:
        operations = w.batch * layer.operations(w.precision)
        if w.precision == "int8" and not layer.rounded:
            full += operations
        else:
            compute += operations
    return Work(
        name=names.DECODER,
        compute_operations=compute,
        full_operations=full,
        traffic=_autoencoder_weights(layers, w.precision).nbytes(itemsize)
        + w.batch * image * FULL,
    )
