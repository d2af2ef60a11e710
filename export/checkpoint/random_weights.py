"""Random weights from a seed, for benchmarks and tests of models without a checkpoint here.

They are scaled so that a model of any depth stays healthy: the residual stream grows like the
square root of the depth, attention is neither flat nor one-hot, logits have the spread of a trained
model's, and images are neither grey nor clipped.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.sampling import check_seed
from var_deploy.spec import TextModelSpec

LOGIT_STD = 2.5
T5_QUERY_GAIN = 0.125  # T5 divides no scores, and 64, the width of its heads, would make them 8
BIT_LOGIT_STD = 1.0  # of each of the two logits of a bit: some bits are open, most are not
POOL_SPREAD = 1.5  # queries that are drawn to a few of the text tokens, not to all alike
PIXEL_GAIN = 0.6  # SiLU leaves an rms of 0.6, so pixels spread by about 0.36 in [-1, 1]
GAMMA = 0.5  # mean of the residual gates; 72 of them (36 blocks) lead to an rms of about 3
MODULATION_GAIN = 0.3


class RandomWeights:
    """A weight source that generates every tensor when it is read, and stores none.

    A tensor depends on its key, its shape and the seed alone (Philox4x64, Salmon et al., SC 2011).
    `spreads` has the standard deviations of keys that are not those of a VAR.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int,
        spreads: Mapping[str, float] | None = None,
    ) -> None:
        self._shapes, self._seed = dict(shapes), check_seed(seed)
        self._spreads = spreads or {}

    @property
    def description(self) -> Mapping[str, Any]:
        return {"random_weights": self._seed}

    def __str__(self) -> str:
        return f"random weights {self._seed}"

    def keys(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str) -> NDArray[np.float32]:
        shape = self._shapes[key]
        stream = np.array([zlib.crc32(key.encode()), self._seed], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=stream))
        values = rng.standard_normal(shape, dtype=np.float32)
        spread = self._spreads.get(key, _spread(key, shape))
        values *= np.float32(spread)  # in place: a second copy may not fit
        _centre(key, values)
        return values


def infinity_spreads(spec: TextModelSpec) -> dict[str, float]:
    """Return the standard deviations of the tensors that Infinity has and VAR has not, or has in
    another form."""
    width, bits = spec.transformer.width, spec.tokenizer.bits
    # f_hat is a sum over the scales of codes ±1/√d, and the level embedding has 0.5
    embedded = (bits / spec.tokenizer.token_bits) ** 0.5
    return {
        "cfg_uncond": 1.0,
        "text_proj_for_sos.ca.mat_q": POOL_SPREAD,
        "word_embed.weight": embedded,
        "head.weight": BIT_LOGIT_STD * float(width**-0.5),
    }


def _spread(key: str, shape: tuple[int, ...]) -> float:
    """Return the standard deviation of a tensor."""
    fan_in = math.prod(shape[1:]) or 1
    if len(shape) == 1 or "scale_mul" in key or "ada_gss" in key:
        return 0.1 if key.endswith((".weight", "ada_lin.1.bias", "ada_gss")) else 0.02
    if key.endswith("ada_lin.1.weight"):
        return MODULATION_GAIN * float(fan_in**-0.5)
    if key.endswith("SelfAttention.q.weight"):
        return T5_QUERY_GAIN * float(fan_in**-0.5)
    if key in ("class_emb.weight", "pos_start", "shared.weight"):
        return 1.0
    if key in ("pos_1LC", "lvl_embed.weight") or key.startswith("quantize.embedding"):
        return 0.5
    gain = {"head.weight": LOGIT_STD, "decoder.conv_out.weight": PIXEL_GAIN}.get(key, 1.0)
    return gain * float(fan_in**-0.5)


def _centre(key: str, values: NDArray[np.float32]) -> None:
    """Add the mean of a tensor that is not centred at zero, in place."""
    if "scale_mul" in key:
        values += np.float32(math.log(4))
    elif values.ndim == 1 and key.endswith(".weight"):  # of a norm
        values += np.float32(1)
    elif key.endswith("ada_gss"):
        values[..., :2, :] += np.float32(GAMMA)
    elif key.startswith("blocks.") and key.endswith("ada_lin.1.bias"):
        values[: 2 * len(values) // 6] += np.float32(GAMMA)  # gamma1, gamma2 come first
