"""Recognises the sizes of a text-to-image model from the keys and shapes of its two state dicts."""

from __future__ import annotations

from typing import Any

from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export.checkpoint.files import WeightSource
from var_deploy.export.checkpoint.state_shapes import (
    MAX_DEPTH,
    MAX_SCALES,
    autoencoder_sizes,
    count,
    has,
    listed,
    size,
)
from var_deploy.scale_lists import TOKEN_PIXELS, ScaleList
from var_deploy.spec import BitTokenizerSpec, TextModelSpec, TextTransformerSpec

POOL_QUERY = "text_proj_for_sos.ca.mat_q"
HEADS = "blocks.0.sa.scale_mul_1H11"


def recognise_text(
    tokenizer: WeightSource, transformer: WeightSource, scales: ScaleList, text_length: int
) -> TextModelSpec:
    """Return the sizes of an Infinity model, released or not, from its two state dicts.

    State dicts do not tell the scales, which are free to choose, nor how long a text may be: it is
    bounded by `cfg_uncond`, the trained features of "no prompt". `norm_eps` leaves no trace in
    them; the published value is assumed.

    Raises CheckpointError where a state dict is not of this family, is incomplete, or the two do
    not belong together; UsageError for a text that is longer than the model knows.
    """
    tokenizer_spec = _tokenizer(tokenizer, transformer, scales)
    longest = unconditional_length(transformer)
    if not 1 <= text_length <= longest:
        raise UsageError(
            f"the text length must be 1 to {longest}, the longest text that {transformer} was "
            f"trained with (cfg_uncond), found {text_length}"
        )
    try:
        return TextModelSpec(
            tokenizer=tokenizer_spec,
            transformer=TextTransformerSpec(
                **{k: n for k, n in transformer_sizes(transformer).items() if k != "token_bits"},
                text_length=text_length,
                rope_grid=scales.rope_grid,
            ),
        )
    except UsageError as error:  # the checkpoint's sizes, not an argument, are out of range
        raise CheckpointError(
            f"{transformer} is not a transformer of this family: {error}"
        ) from None


def transformer_sizes(transformer: WeightSource) -> dict[str, int]:
    """Return the sizes that a transformer's state dict tells, under the names of
    `TextTransformerSpec`, and the bits of a token. Raises CheckpointError as `recognise_text`."""
    return {
        "depth": count(transformer, r"blocks\.(\d+)\.", "blocks", MAX_DEPTH),
        "width": size(transformer, "pos_start", 2, rank=3),
        "heads": size(transformer, HEADS, 1, rank=4),
        "ffn_width": size(transformer, "blocks.0.ffn.fc1.weight", 0),
        "text_width": size(transformer, "cfg_uncond", 1, rank=2),
        "pool_heads": size(transformer, POOL_QUERY, 1, rank=3),
        "levels": size(transformer, "lvl_embed.weight", 0, limit=MAX_SCALES),
        "unconditional_length": unconditional_length(transformer),
        "token_bits": size(transformer, "word_embed.weight", 1, rank=2),
    }


def tokenizer_sizes(tokenizer: WeightSource) -> dict[str, Any]:
    """Return the sizes that a tokenizer's state dict tells, under the names of
    `BitTokenizerSpec`. Raises CheckpointError as `recognise_text`."""
    bits = size(tokenizer, "encoder.conv_out.weight", 0, rank=4)
    return {"bits": bits, **autoencoder_sizes(tokenizer)}


def unconditional_length(transformer: WeightSource) -> int:
    """Return the tokens of the longest text that a transformer was trained with."""
    return size(transformer, "cfg_uncond", 0, rank=2)


def _tokenizer(
    tokenizer: WeightSource, transformer: WeightSource, scales: ScaleList
) -> BitTokenizerSpec:
    if has(tokenizer, "quantize.embedding.weight") or has(tokenizer, "post_quant_conv.weight"):
        raise CheckpointError(
            f"{tokenizer} is a tokenizer of codes, as VAR has, expected one of bits"
        )
    bits = size(tokenizer, "encoder.conv_out.weight", 0, rank=4)
    token_bits = size(transformer, "word_embed.weight", 1, rank=2)
    patch = {bits: 1, 4 * bits: 2}.get(token_bits)
    if patch is None:
        raise CheckpointError(
            f"{transformer} does not belong to {tokenizer}: its tokens have {token_bits} bits "
            f"(word_embed.weight is {listed(transformer.shape('word_embed.weight'))}), expected "
            f"{bits}, or {4 * bits} with patches (encoder.conv_out.weight is "
            f"{listed(tokenizer.shape('encoder.conv_out.weight'))})"
        )
    try:
        spec = BitTokenizerSpec(
            grids=scales.grids, bits=bits, patch=patch, **autoencoder_sizes(tokenizer)
        )
    except UsageError as error:  # the checkpoint's sizes, not an argument, are out of range
        raise CheckpointError(f"{tokenizer} is not a tokenizer of this family: {error}") from None
    if spec.downsample * patch != TOKEN_PIXELS:
        raise CheckpointError(
            f"{tokenizer} makes {spec.downsample * patch} × {spec.downsample * patch} pixels of a "
            f"token of {transformer}, expected {TOKEN_PIXELS} × {TOKEN_PIXELS}, as all scale lists "
            "have"
        )
    return spec
