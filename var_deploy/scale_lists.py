"""The lists of token grids that Infinity was trained with (arXiv 2412.04431).

A list belongs to an aspect ratio and a resolution. Each ratio has thirteen scales: all of them make
1M (1024 × 1024 pixels at 1:1), the first seven 0.06M. A token stands for 16 × 16 pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from var_deploy.errors import UsageError
from var_deploy.spec import Grid, TextModelSpec

TOKEN_PIXELS = 16  # along each side

# name of a resolution → how many of the scales make it
RESOLUTIONS: Mapping[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

# aspects W:H of upright images, in the published order, and rows × columns of their scales; a wide
# image has rows and columns swapped
_UPRIGHT: Mapping[str, str] = {
    "1:1": "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    "4:5": "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    "3:4": "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    "2:3": "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    "4:7": "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    "1:2": "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    "2:5": "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    "1:3": "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


@dataclass(frozen=True, kw_only=True)
class ScaleList:
    """The token grids of one aspect ratio and resolution.

    Attributes:
        resolution: a name of RESOLUTIONS.
        aspect: width to height, such as "4:3".
        grids: rows and columns of each scale.
        rope_grid: grid of the aspect's largest resolution, which rules RoPE at every one.
    """

    resolution: str
    aspect: str
    grids: tuple[Grid, ...]
    rope_grid: Grid

    @property
    def image_size(self) -> Grid:
        """Height and width of the image in pixels."""
        rows, columns = self.grids[-1]
        return (TOKEN_PIXELS * rows, TOKEN_PIXELS * columns)

    def __str__(self) -> str:
        height, width = self.image_size
        return f"{self.resolution} at {self.aspect} ({width}x{height})"


def aspects() -> dict[str, float]:
    """Return the aspects W:H that have lists, and their published height over width, which is cut
    to three decimals; in the published order."""
    found = {}
    for name in _UPRIGHT:
        width, height = map(int, name.split(":"))
        found[name] = math.floor(1000 * height / width) / 1000
        if width != height:
            found[f"{height}:{width}"] = math.floor(1000 / found[name]) / 1000
    return found


def scale_list(resolution: str, aspect: str = "1:1") -> ScaleList:
    """Return the list of a resolution and an aspect W:H, such as "0.25M" and "4:3".

    Raises UsageError for a resolution or an aspect that has no list; the message names the nearest.
    """
    if resolution not in RESOLUTIONS:
        raise UsageError(
            f"resolution must be one of {', '.join(RESOLUTIONS)}, or WxH in pixels, "
            f"found {resolution!r}"
        )
    ratio = _ratio(aspect)
    for name in aspects():
        if _ratio(name) == ratio:
            scales = _scales(name)
            return ScaleList(
                resolution=resolution,
                aspect=name,
                grids=scales[: RESOLUTIONS[resolution]],
                rope_grid=scales[-1],
            )
    raise UsageError(
        f"no scale list has aspect {aspect}; the nearest is {_nearest_aspect(float(1 / ratio))}, "
        f"expected one of {', '.join(aspects())}"
    )


def list_of(grids: Sequence[Grid]) -> ScaleList | None:
    """Return the list with exactly these grids; None where there is none."""
    for name in aspects():
        for resolution in RESOLUTIONS:
            found = scale_list(resolution, name)
            if found.grids == tuple(grids):
                return found
    return None


def nearest(height: int, width: int) -> ScaleList:
    """Return the list whose images are nearest to a size in pixels.

    The aspect is chosen as published: the nearest height over width, the earlier one at a tie. Of
    its resolutions, the one is taken whose number of pixels has the ratio nearest to 1. Raises
    UsageError for sizes below 1.
    """
    if height < 1 or width < 1:
        raise UsageError(f"an image needs at least 1x1 pixels, found {width}x{height}")
    aspect = _nearest_aspect(height / width)
    lists = [scale_list(resolution, aspect) for resolution in RESOLUTIONS]
    wanted = math.log(height) + math.log(width)
    return min(lists, key=lambda found: abs(math.log(math.prod(found.image_size)) - wanted))


def parse_scales(resolution: str, aspect: str | None = None) -> ScaleList:
    """Return the list that a user asks for: a name of RESOLUTIONS and an aspect W:H (1:1 where it
    is None), or a size WxH in pixels, whose nearest list is taken.

    Raises UsageError for what is neither, and for an aspect beside a size.
    """
    width, cross, height = resolution.partition("x")
    if not (cross and _is_number(width) and _is_number(height)):
        return scale_list(resolution, aspect or "1:1")
    if aspect is not None:
        raise UsageError(
            f"the size {resolution} has an aspect of its own; give --aspect with a resolution "
            f"({', '.join(RESOLUTIONS)})"
        )
    return nearest(int(height), int(width))


def with_scales(spec: TextModelSpec, scales: ScaleList, text_length: int) -> TextModelSpec:
    """Return the sizes of a model for another list of scales and another text length.

    Raises UsageError where the model has no such length or too few levels.
    """
    return TextModelSpec(
        tokenizer=dataclasses.replace(spec.tokenizer, grids=scales.grids),
        transformer=dataclasses.replace(
            spec.transformer, rope_grid=scales.rope_grid, text_length=text_length
        ),
    )


def _ratio(aspect: str) -> Fraction:
    """Return width over height of an aspect W:H."""
    width, colon, height = aspect.partition(":")
    numbers = colon and _is_number(width) and _is_number(height)
    if not numbers or not int(width) or not int(height):
        raise UsageError(f"aspect must be W:H, such as 4:3 for a wide image, found {aspect!r}")
    return Fraction(int(width), int(height))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6


def _nearest_aspect(height_over_width: float) -> str:
    known = aspects()
    return min(known, key=lambda name: abs(known[name] - height_over_width))


def _scales(aspect: str) -> tuple[Grid, ...]:
    if aspect in _UPRIGHT:
        pairs = (scale.split("x") for scale in _UPRIGHT[aspect].split())
        return tuple((int(rows), int(columns)) for rows, columns in pairs)
    width, height = aspect.split(":")
    return tuple((columns, rows) for rows, columns in _scales(f"{height}:{width}"))
