"""Image resizing as constant matrices, so that it exports anywhere: Y = M_rows · X · M_columnsᵀ.

All kinds equal PyTorch's `interpolate` at the same sizes, without antialiasing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def area_matrix(source: int, target: int) -> NDArray[np.float32]:
    """[target, source] adaptive average pooling: row i averages floor(i·S/T) … ceil((i+1)·S/T)-1.

    Torch's `interpolate(mode="area")` computes the same; at equal sizes it is the identity.
    """
    matrix = np.zeros((target, source), np.float32)
    for row in range(target):
        start, stop = row * source // target, -(-(row + 1) * source // target)
        matrix[row, start:stop] = 1.0 / (stop - start)
    return matrix


def linear_matrix(source: int, target: int) -> NDArray[np.float32]:
    """[target, source] linear interpolation with half-pixel centres, also where it shrinks.

    At equal sizes it is exactly the identity.
    """
    matrix = np.zeros((target, source), np.float32)
    for row in range(target):
        centre = max((row + 0.5) * source / target - 0.5, 0.0)
        first = min(int(centre), source - 1)
        second = min(first + 1, source - 1)
        matrix[row, first] += np.float32(1 - (centre - first))
        matrix[row, second] += np.float32(centre - first)
    return matrix


def bicubic_matrix(source: int, target: int) -> NDArray[np.float32]:
    """[target, source] cubic convolution (Keys 1981) with a = -0.75, half-pixel centres.

    Taps outside the image repeat its border. At equal sizes it is exactly the identity.
    """
    matrix = np.zeros((target, source), np.float64)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            weight = _keys_cubic(abs(centre - tap))
            matrix[row, min(max(tap, 0), source - 1)] += weight
    return matrix.astype(np.float32)


def _keys_cubic(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance * distance + 1
    if distance < 2:
        return a * (((distance - 5) * distance + 8) * distance - 4)
    return 0.0
