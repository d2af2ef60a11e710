"""Compares images and tokens of a variant with those of the fp32 graphs on the CPU.

Each scale is compared on its own: it starts from the reference's tokens, and its sampled tokens are
compared. Where a token differs, the reference samples again with uniforms a little lower and a
little higher. Codes are ordered along the cumulative distribution, so rounding within that margin
gives a token between the two results; a token outside of them is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import BackendError
from var_deploy.image import images
from var_deploy.labels import spread_labels
from var_deploy.manifest import Manifest
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import Sampling, numbered, stack_uniforms

Tokens = NDArray[np.int64]
Image = NDArray[np.float32]

# Largest shift of a uniform that counts as rounding. fp16: as in `verify`; fp32: more than there,
# since a device sums in another order than a CPU.
MARGIN = {"fp32": 1e-3, "fp16": 5e-2}
FORCED_PSNR = {"fp32": 60.0, "fp16": 35.0}  # dB, of an image with all tokens forced
SAME_PSNR = 50.0  # dB, between two variants with the same graphs and precision
EQUAL_PSNR = 200.0  # dB, reported for equal images
LARGEST_UNIFORM = np.float32(1 - 2.0**-24)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one generation of B images; `uniforms` [B, T]."""

    labels: list[int]
    uniforms: NDArray[np.float32]
    sampling: Sampling


def make_cases(manifest: Manifest, images: int) -> list[Case]:
    """Inputs of enough batches for `images` images, with the bundle's default settings."""
    batch, tokens = manifest.batch, manifest.model.total_tokens
    classes = manifest.model.transformer.classes
    return [
        Case(
            labels=spread_labels(classes, batch, first),
            uniforms=stack_uniforms(numbered(0, first, batch), tokens),
            sampling=manifest.defaults,
        )
        for first in range(0, images, batch)
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outputs of one variant for all cases.

    Attributes:
        drawn: tokens by case and scale, with the reference's tokens in all earlier scales.
        free: tokens by case and scale, with its own tokens in earlier scales.
        forced_images: by case, [B, side, side, channels] with the reference's tokens.
        free_images: by case, [B, side, side, channels] with its own tokens.
        repeats: whether a second run with the same inputs gave the same bytes.
    """

    precision: str
    drawn: list[list[Tokens]]
    free: list[list[Tokens]]
    forced_images: list[Image]
    free_images: list[Image]
    repeats: bool


class Reference:
    """Tokens and images of the reference loop for all cases.

    The loop is open only while it computes, so that a variant under test has all memory.

    Args:
        open_loop: opens the reference loop; called again for `near`.
    """

    def __init__(self, open_loop: Callable[[], ScaleLoop], cases: Sequence[Case]) -> None:
        self.cases = list(cases)
        self._open = open_loop
        self._near: dict[tuple[int, int, float], tuple[Tokens, Tokens]] = {}
        self.tokens: list[list[Tokens]] = []
        self.images: list[Image] = []
        loop = open_loop()
        try:
            for case in self.cases:
                self.images.append(loop.run(case.labels, case.uniforms, case.sampling).copy())
                self.tokens.append(loop.tokens())
        finally:
            loop.close()

    def near(
        self, wanted: Sequence[tuple[int, int]], margin: float
    ) -> dict[tuple[int, int], tuple[Tokens, Tokens]]:
        """(case, scale) → tokens [B, L_k] with uniforms `margin` lower, and `margin` higher.

        Results are computed once and kept.
        """
        missing = [pair for pair in wanted if (pair[0], pair[1], margin) not in self._near]
        if missing:
            loop = self._open()
            try:
                for case, scale in missing:
                    self._near[case, scale, margin] = self._ask(loop, case, scale, margin)
            finally:
                loop.close()
        return {pair: self._near[pair[0], pair[1], margin] for pair in wanted}

    def _ask(
        self, loop: ScaleLoop, number: int, scale: int, margin: float
    ) -> tuple[Tokens, Tokens]:
        case, before = self.cases[number], self.tokens[number][:scale]
        found = []
        for shift in (-margin, margin):
            moved = np.clip(case.uniforms + np.float32(shift), 0, LARGEST_UNIFORM)
            loop.run(case.labels, moved, case.sampling, forced=before)
            found.append(loop.tokens()[scale])
        return found[0], found[1]


def observe(loop: ScaleLoop, reference: Reference, precision: str) -> Outcome:
    """Run all cases on another loop: free, with each scale forced in turn, and all forced."""
    drawn, free, forced_images, free_images, repeats = [], [], [], [], True
    for case, tokens in zip(reference.cases, reference.tokens, strict=True):
        given = (case.labels, case.uniforms, case.sampling)
        free_images.append(loop.run(*given).copy())
        free.append(loop.tokens())
        again = loop.run(*given)
        repeats = repeats and _equal([again, *loop.tokens()], [free_images[-1], *free[-1]])
        scales = [free[-1][0]]
        for scale in range(1, len(tokens)):
            loop.run(*given, forced=tokens[:scale])
            scales.append(loop.tokens()[scale])
        drawn.append(scales)
        forced_images.append(loop.run(*given, forced=tokens).copy())
        if not _equal(loop.tokens(), tokens):
            raise BackendError("the graphs do not keep the tokens that they are told to keep")
    return Outcome(
        precision=precision,
        drawn=drawn,
        free=free,
        forced_images=forced_images,
        free_images=free_images,
        repeats=repeats,
    )


def evaluate(outcome: Outcome, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    """Compare an outcome with the reference: (JSON values, problems beyond the bounds)."""
    margin = MARGIN[outcome.precision]
    wanted = [
        (case, scale)
        for case, tokens in enumerate(reference.tokens)
        for scale in range(len(tokens))
        if not np.array_equal(outcome.drawn[case][scale], tokens[scale])
    ]
    near = reference.near(wanted, margin)
    scales, problems = [], []
    for scale in range(len(reference.tokens[0])):
        row = {"scale": scale, "tokens": 0, "forced_equal": 0, "free_equal": 0, "beyond": 0}
        for case, tokens in enumerate(reference.tokens):
            found, free = outcome.drawn[case][scale], outcome.free[case][scale]
            row["tokens"] += found.size
            row["forced_equal"] += int((found == tokens[scale]).sum())
            row["free_equal"] += int((free == tokens[scale]).sum())
            if (case, scale) in near:
                low, high = near[case, scale]
                row["beyond"] += int(((found < low) | (found > high)).sum())
        scales.append(row)
        if row["beyond"]:
            problems.append(
                f"{row['beyond']} of {row['tokens']} tokens of scale {scale} differ beyond "
                f"rounding (margin {margin:g})"
            )
    forced = _all_psnr(outcome.forced_images, reference.images)
    bound = FORCED_PSNR[outcome.precision]
    if min(forced) < bound:
        problems.append(
            f"an image with all tokens given has {min(forced):.1f} dB, at least {bound:.0f} is due"
        )
    total = {
        key: sum(row[key] for row in scales)
        for key in ("tokens", "forced_equal", "free_equal", "beyond")
    }
    result = {
        **total,
        "margin": margin,
        "psnr_bound_db": bound,
        "psnr_forced_db": forced,
        "psnr_free_db": _all_psnr(outcome.free_images, reference.images),
        "repeats": outcome.repeats,
        "scales": scales,
    }
    return result, problems


def compare(one: Outcome, other: Outcome) -> tuple[dict[str, Any], list[str]]:
    """Compare two variants of the same graphs: (JSON values, problems beyond the bounds)."""
    drawn = _share(one.drawn, other.drawn)
    free = _share(one.free, other.free)
    psnr_forced = _all_psnr(one.forced_images, other.forced_images)
    pairs = zip(one.forced_images, other.forced_images, strict=True)
    far = max(float(np.abs(a - b).max()) for a, b in pairs)
    equal = all(
        _equal(a, b)
        for a, b in (
            (one.forced_images, other.forced_images),
            (one.free_images, other.free_images),
        )
    )
    equal = equal and drawn[0] == drawn[1] and free[0] == free[1]
    result = {
        "equal": equal,
        "tokens": drawn[1],
        "forced_equal": drawn[0],
        "free_equal": free[0],
        "largest_difference": far if np.isfinite(far) else None,
        "psnr_forced_db": psnr_forced,
        "psnr_bound_db": SAME_PSNR,
    }
    if min(psnr_forced) >= SAME_PSNR:
        return result, []
    return result, [
        f"images with all tokens given are {min(psnr_forced):.1f} dB apart, at least "
        f"{SAME_PSNR:.0f} is due"
    ]


def psnr(found: Image, expected: Image) -> float:
    """PSNR of images in [0, 1] in dB: 200 where they are equal, -200 where one has NaN."""
    return round(max(-EQUAL_PSNR, images.psnr(found, expected)), 2)


def _all_psnr(found: Sequence[Image], expected: Sequence[Image]) -> list[float]:
    """PSNR of every image of every case, in dB."""
    batches = zip(found, expected, strict=True)
    return [psnr(a, b) for batch in batches for a, b in zip(*batch, strict=True)]


def _share(one: Sequence[Sequence[Tokens]], other: Sequence[Sequence[Tokens]]) -> tuple[int, int]:
    """(number of equal tokens, number of all tokens)."""
    pairs = [
        pair for case in zip(one, other, strict=True) for pair in zip(*case, strict=True)
    ]
    return sum(int((a == b).sum()) for a, b in pairs), sum(a.size for a, _ in pairs)


def _equal(one: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))
