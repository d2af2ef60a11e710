"""The `text_encoder` graph: token ids of one prompt to text features, by a T5 encoder.

Padding is zero in the residual stream, and stays zero: T5 has no biases, so a norm or a product of
a zero row is zero; attention, the one place where padding could receive values, is masked once more
after the values are mixed. The features are therefore zero beyond the prompt, and in int8 the scale
of a product's inputs does not depend on the padding.

fp16 graphs keep the residual stream, norms, softmax, the gated product and `wo` in fp32: T5 is
known to exceed fp16 in the last two (huggingface/transformers issues 4287 and 9295). int8 graphs
keep `wo` in fp32 as well: its inputs have outliers, and one scale that fits them would round the
other inputs away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.export.graphs.norms import rms_norm
from var_deploy.export.models.t5 import BIAS_TABLE, EMBEDDING, relative_buckets
from var_deploy.spec import TextEncoderSpec

MASKED = -1e9  # added to the scores of padding: exp() of it is 0, and no row becomes NaN
BUCKETS = "relative_buckets"


def build_text_encoder(spec: TextEncoderSpec, form: GraphForm) -> GraphBuilder:
    """Build the graph: text_ids [1, S] int64, text_mask [1, S] bool → text_features [1, S, Ct].

    One prompt a launch: the form's batch must be 1.
    """
    length, width = spec.length, spec.width
    b = GraphBuilder(names.TEXT_ENCODER, form)
    ids = b.input(names.TEXT_IDS, np.int64, (1, length))
    mask = b.input(names.TEXT_MASK, np.bool_, (1, length))
    with b.scope("text_embedding"):
        table = b.weight(EMBEDDING, (spec.vocab_size, width), dtype=b.compute)
        keep = b.op("Unsqueeze", mask, b.ints(-1))  # [1, S, 1]
        x = b.to_float(b.op("Gather", table, ids, axis=0))
        x = b.op("Where", keep, x, b.constant(0.0, np.float32))  # [1, S, Ct]
        bias = _score_bias(b, spec, mask)
    for layer in range(spec.depth):
        x = _attention(b, spec, x, bias, keep, layer)
        x = _feed_forward(b, spec, x, layer)
    with b.scope("text_norm"):
        key = "encoder.final_layer_norm.weight"
        features = rms_norm(b, x, key, width, spec.norm_eps)
        b.op("Identity", features, out=names.TEXT_FEATURES)
    b.output(names.TEXT_FEATURES, np.float32, (1, length, width))
    return b


def _score_bias(b: GraphBuilder, spec: TextEncoderSpec, mask: str) -> str:
    """Return what every block adds to its scores: position bias and padding, [1, heads, S, S].

    The bias is looked up in the graph, in the one table that T5 has for all blocks.
    """

    def buckets(read: ReadKey) -> NDArray[Any]:
        return relative_buckets(spec)

    table = b.transpose(b.weight(BIAS_TABLE, (spec.buckets, spec.heads)), 1, 0)
    index = b.weight(BUCKETS, (spec.length, spec.length), buckets, np.int32)
    bias = b.op("Gather", table, index, axis=1)  # [heads, S, S]
    zero, masked = (b.constant(value, np.float32) for value in (0.0, MASKED))
    padding = b.reshape(b.op("Where", mask, zero, masked), 1, 1, 1, spec.length)
    return b.op("Add", bias, padding)


def _attention(
    b: GraphBuilder, spec: TextEncoderSpec, x: str, bias: str, keep: str, layer: int
) -> str:
    """Add self-attention, x + O·attention(norm(x)); scores are not divided by √d."""
    prefix = f"encoder.block.{layer}.layer.0"
    length, heads, head_width = spec.length, spec.heads, spec.head_width
    inner = heads * head_width
    with b.scope(f"text_blocks.{layer}.attention"):
        h = rms_norm(b, x, f"{prefix}.layer_norm.weight", spec.width, spec.norm_eps)
        h = b.to_compute(h)

        def project(part: str, *axes: int) -> str:
            y = b.linear(h, f"{prefix}.SelfAttention.{part}.weight", spec.width, inner, None)
            return b.transpose(b.reshape(y, 1, length, heads, head_width), *axes)

        q, k, v = project("q", 0, 2, 1, 3), project("k", 0, 2, 3, 1), project("v", 0, 2, 1, 3)
        scores = b.op("Add", b.to_float(b.op("MatMul", q, k)), bias)  # [1, heads, S, S]
        weights = b.to_compute(b.op("Softmax", scores, axis=-1))
        mixed = b.transpose(b.op("MatMul", weights, v), 0, 2, 1, 3)  # [1, S, heads, d]
        mixed = b.reshape(mixed, 1, length, inner)
        mixed = b.op("Where", keep, mixed, b.constant(0.0, b.compute))
        y = b.linear(mixed, f"{prefix}.SelfAttention.o.weight", inner, spec.width, None)
        return b.op("Add", x, b.to_float(y))


def _feed_forward(b: GraphBuilder, spec: TextEncoderSpec, x: str, layer: int) -> str:
    """Add the feed-forward part, x + wo(gelu(wi_0 norm(x)) · wi_1 norm(x))."""
    prefix = f"encoder.block.{layer}.layer.1"
    width, inner = spec.width, spec.ffn_width
    with b.scope(f"text_blocks.{layer}.ffn"):
        h = rms_norm(b, x, f"{prefix}.layer_norm.weight", width, spec.norm_eps)
        h = b.to_compute(h)
        gate, up = (
            b.to_float(b.linear(h, f"{prefix}.DenseReluDense.{part}.weight", width, inner, None))
            for part in ("wi_0", "wi_1")
        )
    with b.scope(f"text_wo.{layer}"):
        h = b.op("Mul", b.op("Gelu", gate, approximate="tanh"), up)
        y = b.linear(h, f"{prefix}.DenseReluDense.wo.weight", inner, width, None, full=True)
        return b.op("Add", x, y)
