"""Turns the checkpoint files of a text-to-image model into a model whose every key is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from var_deploy.errors import UsageError
from var_deploy.export.checkpoint.assemble import fitted, load_into, weight_shapes
from var_deploy.export.checkpoint.files import INFINITY_STATE, WeightSource, open_checkpoint
from var_deploy.export.checkpoint.hints import NO_HINTS, Hints
from var_deploy.export.checkpoint.presets import PROMPT_LENGTH, find_text_preset, own_text_file
from var_deploy.export.checkpoint.random_weights import RandomWeights, infinity_spreads
from var_deploy.export.checkpoint.recognise_text import recognise_text, unconditional_length
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.infinity import InfinityTransformer
from var_deploy.sampling import BitSampling
from var_deploy.scale_lists import ScaleList, parse_scales, with_scales
from var_deploy.spec import TextModelSpec

# of the published inference script, for a model without a preset
DEFAULTS = BitSampling(cfg=4.0, temperature=0.5, top_p=0.97)


@dataclass(frozen=True, kw_only=True)
class LoadedTextModel:
    """The sizes of a text-to-image model and where its weights are.

    Attributes:
        preset: name of the preset, "" for a model without one.
        scales: the list of scales that its images are made with.
        tokenizer, transformer: weights under exactly the keys and shapes of the two modules, the
            buffers of zeros included.
        defaults: sampling settings used where a call gives none.
    """

    labels: ClassVar[tuple[str, ...]] = ()
    spec: TextModelSpec
    preset: str
    scales: ScaleList
    tokenizer: WeightSource
    transformer: WeightSource
    defaults: BitSampling

    def source(self, key: str) -> WeightSource:
        """Return the weight source that holds a key (no key is in both). Raises KeyError."""
        for source in (self.transformer, self.tokenizer):
            keys = source.keys()
            if key in keys:
                return source
        raise KeyError(key)


def load_text_model(
    preset: str | None = None,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    random_weights: int | None = None,
    resolution: str | None = None,
    aspect: str | None = None,
    text_length: int | None = None,
    hints: Hints = NO_HINTS,
    fallback: Hints = NO_HINTS,
    progress: Callable[[str], None] | None = None,
) -> LoadedTextModel:
    """Open the weights of a preset, of files, or random ones, and check them against the model.

    Args:
        preset: name of a text-to-image preset, whose files are those given, or else fetched; None:
            both files must be given, and the sizes are recognised.
        checkpoint: file with the transformer, or the folder of its shards.
        tokenizer: file with the tokenizer (may be the same one, where it holds both).
        random_weights: a seed; no file is read.
        resolution, aspect: as in `scale_lists.parse_scales`; without a resolution, the preset's.
        text_length: S, the most tokens of a text; features of longer ones are cut. None: 128, or
            the longest text that the model was trained with, where that is shorter.
        hints: where the parts lie in their files; heads and scales it cannot tell.
        fallback: where they lie in files that hold several, and the hints do not tell.
        progress: called with what takes long.

    Nothing but metadata is read here. Raises UsageError for arguments that do not go together and
    CheckpointError for files that cannot be had, read, or do not fit.
    """
    known = None if preset is None else find_text_preset(preset)
    if hints.patch_nums is not None or hints.heads is not None:
        raise UsageError(
            "--patch-nums and --heads tell of a VAR; a text-to-image model's heads are in its "
            "checkpoint, and --resolution and --aspect choose its scales"
        )
    if known is not None:
        scales = known.scales_for(resolution, aspect)
    elif resolution is not None:
        scales = parse_scales(resolution, aspect)
    else:
        raise UsageError("a text-to-image model without a preset needs --resolution, such as 0.25M")
    if random_weights is not None:
        if known is None or preset is None:
            raise UsageError("--random-weights needs a preset, which tells the sizes")
        if checkpoint is not None or tokenizer is not None or hints != NO_HINTS:
            raise UsageError("--random-weights and checkpoint files exclude each other")
        spec = with_scales(known.spec, scales, text_length or known.text_length)
        return random_text_model(
            spec, random_weights, scales=scales, preset=preset, defaults=known.defaults
        )
    if known is None and (checkpoint is None or tokenizer is None):
        lacking = "--checkpoint" if checkpoint is None else "--tokenizer"
        raise UsageError(
            f"a model without a preset needs --checkpoint and --tokenizer; {lacking} is missing "
            "(one file that holds both may be given twice)"
        )
    if known is not None:
        tokenizer = tokenizer or own_text_file(known, "tokenizer", progress)
        checkpoint = checkpoint or own_text_file(known, "transformer", progress)
    assert checkpoint is not None and tokenizer is not None
    parts = (
        open_checkpoint(
            *(tokenizer, "tokenizer", hints.tokenizer_key, fallback.tokenizer_key), INFINITY_STATE
        ),
        open_checkpoint(checkpoint, "transformer", hints.key, fallback.key, INFINITY_STATE),
    )
    longest = unconditional_length(parts[1])
    if text_length is None:
        text_length = min(PROMPT_LENGTH, longest)
    found = recognise_text(*parts, scales, text_length)
    if known is None:
        return assemble_text(found, *parts, scales=scales)
    # a file may know longer or shorter texts than the released one; all other sizes must agree
    spec = with_scales(
        dataclasses.replace(
            known.spec,
            transformer=dataclasses.replace(
                known.spec.transformer,
                text_length=text_length,
                unconditional_length=longest,
            ),
        ),
        scales,
        text_length,
    )
    assert preset is not None
    return assemble_text(spec, *parts, scales=scales, preset=preset, defaults=known.defaults)


def random_text_model(
    spec: TextModelSpec,
    seed: int,
    *,
    scales: ScaleList,
    preset: str = "",
    defaults: BitSampling = DEFAULTS,
) -> LoadedTextModel:
    """Return a model of any sizes with random weights."""
    spreads = infinity_spreads(spec)
    tokenizer, transformer = (
        RandomWeights(weight_shapes(module), seed, spreads) for module in empty_text_modules(spec)
    )
    return assemble_text(
        spec, tokenizer, transformer, scales=scales, preset=preset, defaults=defaults
    )


def assemble_text(
    spec: TextModelSpec,
    tokenizer: WeightSource,
    transformer: WeightSource,
    *,
    scales: ScaleList,
    preset: str = "",
    defaults: BitSampling = DEFAULTS,
) -> LoadedTextModel:
    """Make a model of a tokenizer's and a transformer's weights, checked against its sizes.

    Raises CheckpointError that lists, by key, shapes found and expected, missing and unexpected
    keys.
    """
    tokenizer_module, transformer_module = empty_text_modules(spec)
    return LoadedTextModel(
        spec=spec,
        preset=preset,
        scales=scales,
        tokenizer=fitted(tokenizer, tokenizer_module, preset),
        transformer=fitted(transformer, transformer_module, preset),
        defaults=defaults,
    )


def empty_text_modules(spec: TextModelSpec) -> tuple[BitTokenizer, InfinityTransformer]:
    """Build tokenizer and transformer on the meta device: every key and shape, no memory."""
    with torch.device("meta"):
        return BitTokenizer(spec.tokenizer).eval(), InfinityTransformer(spec).eval()


def build_text_modules(model: LoadedTextModel) -> tuple[BitTokenizer, InfinityTransformer]:
    """Build tokenizer and transformer with their weights, in fp32, evaluation mode, no
    gradients."""
    tokenizer, transformer = empty_text_modules(model.spec)
    load_into(tokenizer, model.tokenizer)
    load_into(transformer, model.transformer)
    return tokenizer, transformer
