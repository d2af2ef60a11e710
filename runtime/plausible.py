"""Checks that the outputs of the graphs are possible outputs of a model.

The checks look only at the values of tokens, f_hat and images, so they work for every backend. They
cost a few passes over arrays that are small compared with a generation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.errors import BackendError
from var_deploy.finite import describe_not_finite, is_finite

ROUNDING = 1e-3  # how far an image may leave [0, 1]: less than half a grey level
SAMPLED = 8  # rows and columns of an image that are checked first
ADVICE = (
    "fp16 overflowed, or the weights hold such values; try precision fp32, and var-deploy verify "
    "names the layer"
)


def check_tokens(tokens: NDArray[np.int64], codes: int, scale: int, graph: str) -> None:
    """Raise BackendError where tokens [B, L_k] of `graph` are not in [0, codes).

    The sampler returns the token `codes` where logits are NaN.
    """
    if not tokens.size or 0 <= tokens.min() <= tokens.max() < codes:
        return
    if (tokens[(tokens < 0) | (tokens >= codes)] == codes).all():
        raise BackendError(f"the logits of scale {scale} are not numbers (graph {graph}): {ADVICE}")
    wrong = tokens.min() if tokens.min() < 0 else tokens.max()
    raise BackendError(
        f"graph {graph} gave token {wrong} at scale {scale}, expected 0 to {codes - 1}: the "
        "library computes it wrongly here; try another --backend or --precision, and var-deploy "
        "verify"
    )


def check_f_hat(f_hat: NDArray[np.float32], scale: int, graph: str) -> None:
    """Raise BackendError where f_hat after `scale`, an output of `graph`, is not finite."""
    if not is_finite(f_hat):
        raise BackendError(
            f"f_hat after scale {scale} (graph {graph}) holds {describe_not_finite(f_hat)}: "
            f"{ADVICE}"
        )


def check_features(features: NDArray[np.float32]) -> None:
    """Raise BackendError where text features are not finite."""
    if not is_finite(features):
        raise BackendError(
            f"the text features (graph {names.TEXT_ENCODER}) hold {describe_not_finite(features)}: "
            "fp16 overflowed, or the weights hold such values; try precision fp32"
        )


def check_image(image: NDArray[np.float32], scales: int | None, half: bool) -> None:
    """Raise BackendError where images [B, side, side, channels] cannot come from a decoder.

    Args:
        scales: number of scales that were decoded; None where f_hat is not that of a run.
        half: whether the decoder computes in fp16. The decoder clamps, and on some devices
            clamping turns NaN into a number: in fp16 an image without any value between 0 and 1
            counts as an overflow. In fp32 such an image is accepted.
    """
    after = "" if scales is None else f" decoded after scale {scales - 1}"
    where = f"the image{after} (graph {names.DECODER})"
    with np.errstate(invalid="ignore"):
        low, high = image.min(), image.max()
    if not np.isfinite((low, high)).all():
        raise BackendError(f"{where} holds {describe_not_finite(image)}: {ADVICE}")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise BackendError(
            f"{where} reaches from {low:.3g} to {high:.3g}, expected 0 to 1: the library computes "
            "it wrongly here; try another --backend or --precision, and var-deploy verify"
        )
    if half and any(_all_clamped(one) for one in image):
        raise BackendError(
            f"{where} is clamped to 0 or 1 at every value, as fp16 leaves it where it overflows; "
            "try precision fp32, and var-deploy verify names the layer"
        )


def check_encoded(tokens: Sequence[NDArray[np.int64]], codes: int, half: bool) -> None:
    """Raise BackendError where tokens [B, L_k] of every scale cannot come from an encoder.

    An encoder maps NaN to code 0: in fp16, where the encoder may overflow, an image whose tokens
    are all 0 is refused.
    """
    for scale, found in enumerate(tokens):
        check_tokens(found, codes, scale, names.ENCODER)
    if half and codes > 1 and not _not_all_zero(tokens).all():
        raise BackendError(
            f"graph {names.ENCODER} gave the first code alone at every scale, as fp16 leaves it "
            "where it overflows; try precision fp32, and var-deploy verify names the layer"
        )


def _not_all_zero(tokens: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """[B], whether any token of an image, at any scale, differs from 0."""
    found: NDArray[np.bool_] = np.any(
        [scale.reshape(len(scale), -1).any(axis=1) for scale in tokens], axis=0
    )
    return found


def _all_clamped(image: NDArray[np.float32]) -> bool:
    """Whether each value of an image [side, side, channels] is exactly 0 or exactly 1."""
    step = max(len(image) // SAMPLED, 1)
    parts = (image[::step, ::step], image)  # a few rows and columns decide it for most images
    return all(bool(((part == 0) | (part == 1)).all()) for part in parts)
