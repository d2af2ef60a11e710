"""Measures of the difference between a tensor and its expected value; infinite where it has NaN."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1e-6  # smallest magnitude to divide by


class TensorDifference(NamedTuple):
    """The difference of a tensor from its expected value: largest absolute, relative, and the bound
    of the relative one."""

    tensor: str
    error: float
    relative: float
    bound: float


def largest_error(expected: NDArray[Any], found: NDArray[Any]) -> tuple[float, float]:
    """Return the largest difference, and that over the largest magnitude of `expected`."""
    want, got = expected.astype(np.float32), found.astype(np.float32)
    if want.shape != got.shape or not np.isfinite(got).all():
        return math.inf, math.inf
    if not want.size:
        return 0.0, 0.0
    error = float(np.abs(got - want).max())
    relative = error / max(float(np.abs(want).max()), SMALLEST)
    return (error, relative) if math.isfinite(relative) else (math.inf, math.inf)


def norm_error(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return ‖found - expected‖ / ‖expected‖ in Frobenius norms.

    It measures the effect of rounding on the whole tensor, where the largest single difference
    would be that of an outlier.
    """
    want, got = expected.astype(np.float64), found.astype(np.float64)
    if want.shape != got.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), SMALLEST))


def place_of_error(expected: NDArray[Any], found: NDArray[Any]) -> str:
    """Return the indices of the largest difference, or of the first NaN: "0, 3, 17"."""
    difference = np.abs(found.astype(np.float32) - expected.astype(np.float32))
    place = np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), expected.shape)
    return ", ".join(str(int(i)) for i in place)


def agreement(expected: NDArray[Any], found: NDArray[Any]) -> str:
    """Return how many values are equal, as "a/b"."""
    return f"{int((expected == found).sum())}/{expected.size}"


def top_1_agreement(expected: NDArray[Any], found: NDArray[Any]) -> str:
    """Return in how many places of logits [B, L, V] the likeliest code is the same, as "a/b"."""
    return agreement(expected.argmax(axis=-1), found.argmax(axis=-1))
