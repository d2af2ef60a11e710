"""How tokens are drawn: the run-time settings and the random numbers.

The same seed gives the same image on every backend, whatever the batch size and wherever in the
batch the image sits: image n takes its T uniforms from a Philox stream of its own.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import UsageError

MAX_SEED = 2**64 - 1
MAX_TOP_K = 2**31 - 1  # far above any codebook, and an integer to every backend


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one `generate` call.

    Attributes:
        cfg: guidance at the last scale; scale k uses cfg · k/(K-1) (VAR, section 3).
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes with this probability; 0 keeps all.
        temperature: divides the logits before filtering.

    Raises UsageError for a value that is NaN or out of range.
    """

    cfg: float = 4.0
    top_k: int = 900
    top_p: float = 0.95
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _number("cfg", self.cfg, 0.0, 1000.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("temperature", self.temperature, 1e-3, 1000.0)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, numbers.Integral):
            raise UsageError(f"top_k must be a whole number, found {self.top_k!r}")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise UsageError(f"top_k must lie between 0 (off) and 2**31 - 1, found {self.top_k}")

    def guidance(self, scale: int, scales: int) -> float:
        """t at `scale`: logits = (1 + t)·conditional - t·unconditional."""
        return self.cfg * scale / (scales - 1) if scales > 1 else self.cfg

    def replace(self, **changes: Any) -> Sampling:
        """A copy with the settings that are not None changed; they are validated again."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} must be a number, found {value!r}")
    if not math.isfinite(float(value)) or not low <= float(value) <= high:
        raise UsageError(f"{name} must lie between {low:g} and {high:g}, found {value}")


def check_seed(seed: object) -> int:
    """The seed as an int in 0 … 2⁶⁴-1, or UsageError."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise UsageError(f"seed must be a whole number, found {seed!r}")
    if not 0 <= int(seed) <= MAX_SEED:
        raise UsageError(f"seed must lie between 0 and 2**64 - 1, found {seed}")
    return int(seed)


def uniforms(seed: int, image: int, tokens: int) -> NDArray[np.float32]:
    """[tokens] numbers in [0, 1) for image number `image` of a request.

    Philox4x64 (Salmon et al., SC 2011) keyed by (seed, image). The top 24 bits are used, so every
    number is exact in fp32 and none rounds up to 1.
    """
    bits = np.random.Philox(key=np.array([seed, image], np.uint64)).random_raw(tokens)
    drawn: NDArray[np.float32] = (bits >> np.uint64(40)).astype(np.float32)
    drawn *= np.float32(2.0**-24)
    return drawn
