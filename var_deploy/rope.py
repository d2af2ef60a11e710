"""Rotary position embedding in two axes, as tables of cosines and sines (Infinity).

The pairs of a head turn with the row in their first half and with the column in their second half.
Positions of every scale are those of one grid, so that a place in the image has the same angles at
every scale: row r of h_k is row round(r · h / h_k) of that grid, ties to even.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from var_deploy.spec import Grid

BASE = 10000.0


def rope_angles(grid: Grid, reference: Grid, head_width: int) -> NDArray[np.float64]:
    """Angles [L, D/2] of the tokens of a grid, row by row: a token's pair j turns by angle j.

    Angle j is row · 10000^(-4j/D) for j < D/4 and column · 10000^(-4(j - D/4)/D) from there on,
    with row and column of `reference`.
    """
    quarter = head_width // 4
    frequencies = BASE ** (-4.0 * np.arange(quarter) / head_width)
    rows, columns = (
        np.array([round(Fraction(n * whole, size)) for n in range(size)], np.float64)
        for size, whole in zip(grid, reference, strict=True)
    )
    by_row = np.repeat(rows, len(columns))[:, None] * frequencies
    by_column = np.tile(columns, len(rows))[:, None] * frequencies
    return np.concatenate([by_row, by_column], axis=1)


def rope_tables(
    grid: Grid, reference: Grid, head_width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines [L, D/2] of `rope_angles`."""
    angles = rope_angles(grid, reference, head_width)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
