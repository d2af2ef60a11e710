"""Finds NaN and infinity in arrays; costs one sum where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_HALF_MAGNITUDE, _HALF_INFINITY = 0x7FFF, 0x7C00  # bits of fp16 without sign; of its infinity


def is_finite(values: NDArray[Any]) -> bool:
    """Whether an array has neither NaN nor infinite values; integers never have."""
    if values.dtype.kind not in "fc" or not values.size:
        return True
    if values.dtype == np.float16:  # NumPy computes in fp16 one value at a time; bits are faster
        bits = np.ascontiguousarray(values).view(np.uint16)
        return int((bits & _HALF_MAGNITUDE).max()) < _HALF_INFINITY
    with np.errstate(over="ignore", invalid="ignore"):
        # NaN and infinity survive a sum. So may an overflow of the sum itself: looked at closely
        if np.isfinite(values.sum()):
            return True
    return bool(np.isfinite(values).all())


def describe_not_finite(values: NDArray[Any]) -> str:
    """Describe the NaN and infinite values: "2 values that are not finite
    (the first is nan at [0, 3])"."""
    wrong = np.argwhere(~np.isfinite(values))
    first = tuple(int(n) for n in wrong[0])
    count = f"{len(wrong)} value{'s' if len(wrong) > 1 else ''}"
    verb = "are" if len(wrong) > 1 else "is"
    return f"{count} that {verb} not finite (the first is {values[first]} at {list(first)})"
