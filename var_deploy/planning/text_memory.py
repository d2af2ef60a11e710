"""The buffers and scratch memory of a text-to-image model, and the memory of its text encoder.

The counterparts for models of codes, and what both kinds share, are in `memory`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from var_deploy.config import LARGEST_SCORES, Precision
from var_deploy.planning.precisions import cpu_precision, gpu_precision
from var_deploy.planning.text_costs import text_encoder_weights
from var_deploy.planning.workload import FULL, Workload, itemsize_of, unrounded
from var_deploy.spec import TextEncoderSpec

SESSION = 4_000_000  # of ONNX Runtime, besides weights
HEADROOM = 0.9  # share of free memory that scales and text encoder may take together


def upload_sizes(w: Workload) -> list[int]:
    """Sizes in bytes of the tensors that are copied from the host before a generation."""
    model, batch, length = w.text, w.batch, w.text.transformer.text_length
    features = batch * length * model.transformer.text_width * FULL
    sizes = [features, w.rows * length, batch * length]
    if w.guidance:  # features of a negative prompt, and their mask
        sizes += [features, batch * length]
    for tokens in model.scale_lengths:
        bits = batch * tokens * model.tokenizer.token_bits
        # cfg, temperature, top_p; uniforms, keep_mask, keep_tokens
        sizes += [FULL, FULL, FULL, FULL * bits, batch * tokens, 8 * bits]
    return sizes


def other_sizes(w: Workload) -> list[int]:
    """Sizes in bytes of all other inputs and outputs of a generation, besides the cache."""
    model, batch, rows = w.text, w.batch, w.rows
    t, tok = model.transformer, model.tokenizer
    height, width = tok.latent_grid
    text = rows * t.width * t.text_length * w.cache_itemsize
    sizes = [rows * t.width * FULL, (6 * t.depth + 2) * rows * t.width * FULL]
    sizes += 2 * t.depth * [text]  # keys and values of the text, in each block
    sizes += 3 * [batch * tok.bits * height * width * FULL]  # f_hat
    sizes.append(batch * math.prod(tok.image_size) * tok.image_channels * FULL)
    for scale, length in enumerate(model.scale_lengths):
        last = scale + 1 == model.scales
        here = tok.latent_grids[scale]
        following = (tok.patch, tok.patch) if last else tok.latent_grids[scale + 1]
        # bits; the input; scale, four matrices and two tables of rotations
        sizes += [8 * batch * length * tok.token_bits, batch * length * model.input_width * FULL]
        sizes += [8, *(FULL * a * b for a, b in zip((height, width), here, strict=True))]
        sizes += [FULL * a * b for a, b in zip(following, (height, width), strict=True)]
        sizes += 2 * [length * (t.head_width // 2) * FULL]
    return sizes


def condition_scratch(w: Workload) -> int:
    """Bytes of the intermediates of a condition graph: twice its largest tensors."""
    t = w.text.transformer
    tokens = w.batch * t.text_length
    return 2 * FULL * tokens * (t.text_width + 3 * t.width)


def scale_scratch(w: Workload, scale: int, gpu: bool, score_copies: int) -> int:
    """Bytes of the intermediates of a scale: the largest of self-attention, cross-attention and
    feed-forward, which run one after the other."""
    model, t = w.text, w.text.transformer
    size = w.cache_itemsize if gpu else FULL
    length = model.scale_lengths[scale]
    attended = model.prefix_lengths[scale] + length
    tokens = length * w.rows
    residual = (FULL + size) * tokens * t.width

    def scores(keys: int) -> int:
        return score_copies * score_bytes(w.rows, t.heads, length, keys)

    # keys and values with the past, and in the order in which they are multiplied
    mixed = 4 * size * attended * w.rows * t.width + scores(attended)
    feed_forward = (2 if gpu else 4) * size * tokens * t.ffn_width
    return residual + max(mixed, 2 * size * tokens * t.width + scores(t.text_length), feed_forward)


def score_bytes(rows: int, heads: int, queries: int, keys: int) -> int:
    """Bytes of the attention scores that exist at one time: attention is done in pieces where all
    of them would be more than LARGEST_SCORES."""
    one = FULL * queries * keys
    if one * rows > LARGEST_SCORES:
        return one
    return one * rows * max(1, min(heads, LARGEST_SCORES // (one * rows)))


# the text encoder


@dataclass(frozen=True, kw_only=True)
class TextEncoderMemory:
    """Bytes of memory of a text encoder that is loaded.

    Attributes:
        weights: weights as the library holds them.
        scratch: intermediates of a prompt (an estimate).
        loading: memory that is used only while weights are read.
    """

    weights: int
    scratch: int
    loading: int = 0

    @property
    def peak(self) -> int:
        """The most bytes at one time; `scratch` and `loading` are not used at the same time."""
        return self.weights + max(self.scratch, self.loading)


def text_encoder_memory(
    spec: TextEncoderSpec, precision: Precision, *, gpu: bool
) -> TextEncoderMemory:
    """Predict the memory of a text encoder on ONNX Runtime, which runs it on GPUs as well."""
    held, itemsize = text_encoder_weights(spec, precision), itemsize_of(precision)
    weights = held.nbytes(itemsize)
    if not gpu:
        # a CPU computes fp16 in fp32, and of the table of tokens, which stays in the mapped file,
        # it reads a few rows
        table = unrounded(spec.vocab_size * spec.width, precision)
        itemsize = FULL if precision == "fp16" else itemsize
        weights = held.nbytes(itemsize) - table.nbytes(itemsize)
    scores = spec.heads * spec.length**2 * FULL
    hidden = spec.length * (2 * spec.width + 4 * spec.ffn_width) * FULL
    return TextEncoderMemory(weights=weights + SESSION, scratch=4 * scores + hidden)


def text_encoder_precision(held: Collection[str], wanted: str, *, gpu: bool) -> Precision:
    """Return the precision in which a text encoder runs beside scales of precision `wanted`, of
    the precisions that its bundle holds.

    Raises BackendError where it holds none for a GPU.
    """
    if wanted not in held:
        wanted = gpu_precision(held, "a GPU") if gpu else cpu_precision(held)
    return cast(Precision, wanted)


def keeps_text_encoder(
    scales: int, encoder: int, available: int | None, *, keep: bool = False
) -> tuple[bool, str]:
    """Decide whether a text encoder stays in memory beside the scales: (stays, reason).

    Where it does not, the two take turns: the text encoder is loaded and released for each new
    prompt, and nothing of the scales is in memory meanwhile.

    Args:
        scales: peak of a generation in bytes, without the text encoder.
        encoder: peak of the text encoder in bytes.
        available: bytes that both may take; None where unknown.
        keep: the user wants it to stay.
    """
    if keep:
        return True, "as asked for"
    if available is None:
        return True, "the free memory is not known"
    both = f"scales {scales / 1e9:.1f} GB and text encoder {encoder / 1e9:.1f} GB"
    free = f"{available / 1e9:.1f} GB that are free"
    if scales + encoder <= HEADROOM * available:
        return True, f"{both} fit in the {free}"
    return False, f"{both} together would not leave a tenth of the {free}"
