"""Recognises the sizes of a model from the keys and shapes of its two state dicts."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export.checkpoint.files import WeightSource
from var_deploy.export.checkpoint.hints import NO_HINTS, Hints
from var_deploy.export.checkpoint.presets import PRESETS
from var_deploy.export.checkpoint.state_shapes import (
    MAX_DEPTH,
    MAX_SCALES,
    autoencoder_sizes,
    count,
    has,
    listed,
    size,
)
from var_deploy.export.families import EXPORT_FAMILIES, ExportFamily
from var_deploy.families import FAMILIES
from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

CODEBOOK_PER_SCALE = "quantize.embedding.0.weight"

MAX_TOKENS = 1 << 14  # far beyond the 2240 of the largest model


def recognise(
    tokenizer: WeightSource,
    transformer: WeightSource,
    hints: Hints = NO_HINTS,
    fallback: Hints = NO_HINTS,
) -> ModelSpec:
    """Return the sizes of a model of any family, released or not, from its two state dicts.

    Hints are needed only where nothing in the state dict tells: heads without L2-normalised
    attention, at a width that is not a multiple of 64 (the head width of the released models);
    patch_nums without the buffer lvl_1L, where they are not those of a preset. `norm_eps` and
    `phi_ratio` leave no trace in a state dict; the published values are assumed.

    Args:
        hints: must not contradict the state dicts.
        fallback: taken where neither they nor the hints tell.

    Raises CheckpointError where a state dict is not of this family, is incomplete, or the two do
    not belong together; UsageError where hints are needed or contradict the checkpoint.
    """
    _refuse_swapped(tokenizer, transformer)
    family = _family(transformer)
    head_count = _heads(transformer, family, hints.heads, fallback.heads)
    patch_nums = _patch_nums(transformer, family, hints.patch_nums, fallback.patch_nums)
    tokenizer_spec = _tokenizer(tokenizer, patch_nums)
    _check_fit(tokenizer, transformer, family, tokenizer_spec)
    own = family.own_sizes(partial(has, transformer), partial(size, transformer))
    if FAMILIES[family.name].conditional and own["classes"] < 1:
        raise CheckpointError(
            f"{transformer}: class_emb.weight has {own['classes'] + 1} row, expected one per class "
            "and one more"
        )
    try:
        return ModelSpec(
            tokenizer=tokenizer_spec,
            transformer=TransformerSpec(
                family=family.name,
                depth=count(transformer, r"blocks\.(\d+)\.", "blocks", MAX_DEPTH),
                width=size(transformer, family.start_key, 2, rank=3),
                heads=head_count,
                ffn_width=size(transformer, "blocks.0.ffn.fc1.weight", 0),
                **own,
            ),
        )
    except UsageError as error:  # the checkpoint's sizes, not an argument, are out of range
        raise CheckpointError(
            f"{transformer} is not a transformer of this family: {error}"
        ) from None


def _family(transformer: WeightSource) -> ExportFamily:
    """Return the family most of whose keys are in the state dict."""
    families = EXPORT_FAMILIES.values()
    return max(families, key=lambda family: sum(has(transformer, key) for key in family.marks))


def _refuse_swapped(tokenizer: WeightSource, transformer: WeightSource) -> None:
    for family in EXPORT_FAMILIES.values():
        if has(tokenizer, family.positions_key) and not has(transformer, family.positions_key):
            raise CheckpointError(
                f"{tokenizer} holds a transformer and {transformer} does not: "
                "were --checkpoint and --tokenizer swapped?"
            )


def _heads(
    transformer: WeightSource, family: ExportFamily, asked: int | None, fallback: int | None
) -> int:
    width, key = size(transformer, family.start_key, 2, rank=3), family.heads_key
    if has(transformer, key):
        stored = size(transformer, key, 1)
        if asked not in (None, stored):
            raise UsageError(f"--heads {asked} contradicts {transformer}: {key} has {stored} heads")
        return stored
    asked = fallback if asked is None else asked
    usual = family.usual_head_width
    if asked is None and usual is not None and width % usual == 0:
        return width // usual
    if asked is None:
        name = key.removeprefix("blocks.0.")
        why = "" if usual is None else f" and its width {width} is not a multiple of {usual}"
        raise UsageError(
            f"{transformer} does not tell its number of heads (no {name}){why}; give it with "
            "--heads"
        )
    if asked < 1 or width % asked:
        raise UsageError(f"--heads must divide the width {width}, found {asked}")
    return asked


def _patch_nums(
    transformer: WeightSource,
    family: ExportFamily,
    asked: tuple[int, ...] | None,
    fallback: tuple[int, ...] | None,
) -> tuple[int, ...]:
    positions, levels = family.positions_key, family.levels_key
    total = size(transformer, positions, 1, rank=3, limit=MAX_TOKENS)
    scales = size(transformer, levels, 0, limit=MAX_SCALES)
    place = (
        f"{positions} {listed(transformer.shape(positions))}, "
        f"{levels} {listed(transformer.shape(levels))}"
    )
    stored = _stored_patch_nums(transformer, total, scales, family)
    if stored is not None:
        if asked not in (None, stored):
            raise UsageError(
                f"--patch-nums {typed(asked)} contradicts {transformer}: lvl_1L has {typed(stored)}"
            )
        return stored
    if asked is not None:
        _check_growing(asked)
        tokens = sum(side * side for side in asked)
        if (tokens, len(asked)) != (total, scales):
            raise UsageError(
                f"--patch-nums {typed(asked)} has {tokens} tokens in {len(asked)} scales, "
                f"expected {total} in {scales}, as {transformer} has ({place})"
            )
        return asked
    known = [fallback] if fallback else {p.spec.patch_nums for p in PRESETS.values()}
    fitting = [s for s in known if sum(n * n for n in s) == total and len(s) == scales]
    if len(fitting) == 1:
        return fitting[0]
    raise CheckpointError(
        f"{transformer} lacks lvl_1L, which tells the side lengths of its {scales} scales, and "
        f"no preset has {total} tokens; give them with --patch-nums, such as 1,2,3 "
        f"({scales} numbers that grow from 1 and whose squares add up to {total})"
    )


def _check_growing(patch_nums: tuple[int, ...]) -> None:
    if not patch_nums or patch_nums[0] != 1 or list(patch_nums) != sorted(set(patch_nums)):
        raise UsageError(
            f"--patch-nums must grow from 1, as 1,2,3,5,8 do, found {typed(patch_nums)}"
        )


def _stored_patch_nums(
    transformer: WeightSource, total: int, scales: int, family: ExportFamily
) -> tuple[int, ...] | None:
    """Return the side lengths that lvl_1L, the scale of each token, tells; None where lvl_1L is
    missing."""
    if not has(transformer, "lvl_1L"):
        return None
    positions, levels_key = family.positions_key, family.levels_key
    shape = transformer.shape("lvl_1L")
    if math.prod(shape) > MAX_TOKENS:
        raise CheckpointError(
            f"{transformer}: lvl_1L is {listed(shape)}, expected at most {MAX_TOKENS} tokens"
        )
    levels = transformer.read("lvl_1L").ravel()
    if not levels.size or levels.min() < 0 or levels.max() >= MAX_SCALES:
        # counting a number makes as many counts as it says
        found = f"numbers from {levels.min()} to {levels.max()}" if levels.size else "no numbers"
        raise CheckpointError(
            f"{transformer}: lvl_1L does not list square token maps scale by scale ({found}, "
            f"expected scales from 0 to {scales - 1})"
        )
    lengths = np.bincount(levels)
    sides = tuple(math.isqrt(int(n)) for n in lengths)
    squares = [side * side for side in sides]
    if not np.array_equal(levels, np.repeat(np.arange(len(sides)), squares)):
        raise CheckpointError(
            f"{transformer}: lvl_1L does not list square token maps scale by scale "
            f"(tokens per scale {lengths.tolist()[:16]})"
        )
    if sum(squares) != total or len(sides) != scales:
        raise CheckpointError(
            f"{transformer}: lvl_1L has {sum(squares)} tokens in {len(sides)} scales, expected "
            f"{total} ({positions} {listed(transformer.shape(positions))}) in {scales} "
            f"({levels_key} {listed(transformer.shape(levels_key))})"
        )
    return sides


def _tokenizer(source: WeightSource, patch_nums: tuple[int, ...]) -> TokenizerSpec:
    codebook = _codebook(source)
    shared_phi, phi_ratio = _phi_sharing(source, len(patch_nums))
    try:
        return TokenizerSpec(
            patch_nums=patch_nums,
            vocab_size=size(source, codebook, 0),
            code_width=size(source, codebook, 1),
            shared_phi=shared_phi,
            phi_ratio=phi_ratio,
            codebook_per_scale=codebook == CODEBOOK_PER_SCALE,
            **autoencoder_sizes(source),
        )
    except UsageError as error:  # the checkpoint's sizes, not an argument, are out of range
        raise CheckpointError(f"{source} is not a tokenizer of this family: {error}") from None


def _phi_sharing(source: WeightSource, scales: int) -> tuple[int, float]:
    """Return (shared_phi, phi_ratio)."""
    if has(source, "quantize.quant_resi.qresi.weight"):
        return 1, 0.5
    shared = count(source, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.", "φ", MAX_SCALES)
    if shared:
        return shared, 0.5
    own = count(source, r"quantize\.quant_resi\.(\d+)\.", "φ", MAX_SCALES)
    if own == 0:
        return 0, 0.0
    if own != scales:
        raise CheckpointError(
            f"{source} holds {own} φ (quantize.quant_resi.k), one per scale, expected {scales}: "
            "it belongs to a transformer of other scales"
        )
    return 0, 0.5


def _codebook(source: WeightSource) -> str:
    """Return the key of the codebook, or of the first of several."""
    return CODEBOOK_PER_SCALE if has(source, CODEBOOK_PER_SCALE) else "quantize.embedding.weight"


def _check_fit(
    tokenizer: WeightSource, transformer: WeightSource, family: ExportFamily, spec: TokenizerSpec
) -> None:
    """Check that the transformer reads this tokenizer's codes and predicts its tokens."""
    width = size(transformer, family.start_key, 2, rank=3)
    expected = {
        **family.input_weights(width, spec),
        "head.weight": (spec.vocab_size, width),
    }
    problems = []
    for key, shape in expected.items():
        size(transformer, key, 0)  # present, and a matrix
        if transformer.shape(key) != shape:
            problems.append(f"{key} is {listed(transformer.shape(key))}, expected {listed(shape)}")
    scales = size(transformer, family.levels_key, 0)
    if spec.codebook_per_scale:
        codebooks = count(tokenizer, r"quantize\.embedding\.(\d+)\.", "codebooks", MAX_SCALES)
        if codebooks != scales:
            problems.append(f"{scales} scales, expected {codebooks} (quantize.embedding.k)")
    if problems:
        key = _codebook(tokenizer)
        raise CheckpointError(
            f"{transformer} does not belong to {tokenizer}: {'; '.join(problems)} "
            f"({key} is {listed(tokenizer.shape(key))})"
        )


def typed(patch_nums: tuple[int, ...] | None) -> str:
    """Return side lengths in the form that --patch-nums takes."""
    return ",".join(map(str, patch_nums or ()))
