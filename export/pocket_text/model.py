"""Sizes and default settings of pocket-text, a small text-to-image model of Infinity's form."""

from __future__ import annotations

from var_deploy.sampling import BitSampling
from var_deploy.scale_lists import ScaleList
from var_deploy.spec import BitTokenizerSpec, TextEncoderSpec, TextModelSpec, TextTransformerSpec

TEXT_LENGTH = 32  # tokens; the longest sentence that it was trained with has some 25
# tokens of 16 × 16 pixels, as in all of the family: patches of 2 × 2 latent positions
GRIDS = tuple((side, side) for side in (1, 2, 3, 4))
SCALES = ScaleList(resolution="64x64", aspect="1:1", grids=GRIDS, rope_grid=GRIDS[-1])
DEFAULTS = BitSampling(cfg=3.0, temperature=0.7, top_p=0.9)

TEXT_ENCODER = TextEncoderSpec(
    width=128,
    depth=2,
    heads=4,
    head_width=32,
    ffn_width=256,
    vocab_size=121,
    length=TEXT_LENGTH,
)
POCKET_TEXT = TextModelSpec(
    tokenizer=BitTokenizerSpec(
        grids=GRIDS, bits=16, patch=2, base_width=32, width_multipliers=(1, 1, 2, 2), res_blocks=1
    ),
    transformer=TextTransformerSpec(
        depth=6,
        width=192,
        heads=6,
        ffn_width=768,
        text_width=TEXT_ENCODER.width,
        text_length=TEXT_LENGTH,
        pool_heads=4,
        rope_grid=GRIDS[-1],
        levels=len(GRIDS),
        unconditional_length=TEXT_LENGTH,
    ),
)
