"""A small text-to-image bundle beside its text encoder, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from var_deploy.export.checkpoint.text_model import LoadedTextModel

GRIDS = ((1, 1), (2, 3), (4, 6))
HEIGHT, WIDTH, SCALES, TEXT_LENGTH = 16, 24, 3, 24


def text_model(text_width: int) -> LoadedTextModel:
    """An Infinity with random weights, for features of this width."""
    from var_deploy.export.checkpoint.text_model import random_text_model
    from var_deploy.scale_lists import ScaleList
    from var_deploy.spec import BitTokenizerSpec, TextModelSpec, TextTransformerSpec

    spec = TextModelSpec(
        tokenizer=BitTokenizerSpec(
            grids=GRIDS, bits=4, base_width=32, width_multipliers=(1, 1, 1), res_blocks=1
        ),
        transformer=TextTransformerSpec(
            depth=2,
            width=64,
            heads=2,
            ffn_width=128,
            text_width=text_width,
            text_length=TEXT_LENGTH,
            pool_heads=2,
            rope_grid=GRIDS[-1],
        ),
    )
    scales = ScaleList(resolution="", aspect="", grids=GRIDS, rope_grid=GRIDS[-1])
    return random_text_model(spec, 5, scales=scales)


def export_text_bundle(place: Path) -> Path:
    """Write an Infinity with random weights, and the golden T5 beside it; the bundle's folder.

    Two images a launch, of HEIGHT × WIDTH pixels.
    """
    import t5_case
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.text_encoder import open_text_encoder
    from var_deploy.export.text_encoder_bundle import export_text_encoder
    from var_deploy.manifest import TextEncoderRef
    from var_deploy.text.manifest import read_text_encoder

    encoder, bundle = place / "t5", place / "bundle"
    t5 = open_text_encoder(t5_case.hub_folder(place / "hub"), t5_case.SPEC.length)
    export_text_encoder(t5, encoder, ("fp32",))
    export_bundle(
        text_model(t5_case.SPEC.width),
        bundle,
        ExportOptions(batch=2, guidance=None, layout="shared"),
        text_encoder=TextEncoderRef(
            digest=read_text_encoder(encoder).digest(), folder=encoder.name
        ),
    )
    return bundle
