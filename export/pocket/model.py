"""Sizes and class names of pocket, the small model that ships with var-deploy."""

from __future__ import annotations

from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

CLASS_NAMES: tuple[str, ...] = (
    "star",
    "heart",
    "house",
    "tree",
    "fish",
    "flower",
    "sun",
    "moon",
    "mushroom",
    "boat",
)

POCKET = ModelSpec(
    tokenizer=TokenizerSpec(
        patch_nums=(1, 2, 3, 5, 8),
        vocab_size=512,
        code_width=16,
        base_width=32,
        width_multipliers=(1, 1, 2, 2),
        res_blocks=1,
        shared_phi=4,
    ),
    transformer=TransformerSpec(
        depth=5, width=192, heads=6, classes=10, ffn_width=768, shared_adaln=True
    ),
)
