"""Angles of Infinity's rotary position embedding in two axes (arXiv 2412.04431).

Apart from `var_deploy.rope` on purpose: `verify` compares the graphs, which take theirs from there,
with the reference module, which takes these.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from var_deploy.spec import TextModelSpec

BASE = 10000.0


def rope_tables(spec: TextModelSpec) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return cosines and sines, each [L_k, D/2], of every scale.

    Channels 2j and 2j+1 of a head turn together by the angle in column j. The first D/4 pairs turn
    with the row, the others with the column. Rows and columns of every scale are those of
    `rope_grid`, so that a place in the image has about the same angles at each scale.
    """
    grid = spec.transformer.rope_grid
    quarter = spec.transformer.head_width // 4
    frequencies = BASE ** (-np.arange(quarter) / quarter)
    tables = []
    for scale in spec.grids:
        rows, columns = (places(count, last) for count, last in zip(scale, grid, strict=True))
        row, column = np.meshgrid(rows, columns, indexing="ij")
        angles = np.concatenate(
            [place.reshape(-1, 1) * frequencies for place in (row, column)], axis=1
        )
        tables.append((np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)))
    return tables


def places(count: int, last: int) -> NDArray[np.int64]:
    """Return the places of `count` rows on a grid of `last` rows: r · last / count, rounded half
    to even.

    The exact rational is rounded: it agrees with the published tables everywhere, and float64
    arithmetic does not.
    """
    whole, rest = np.divmod(np.arange(count, dtype=np.int64) * last, count)
    up = (2 * rest > count) | ((2 * rest == count) & (whole % 2 == 1))
    return np.asarray(whole + up, np.int64)
