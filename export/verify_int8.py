"""What agrees with the model in int8: close enough to draw the same pictures.

Rounding to 8 bits is felt in every token, so no single value can be bound. Bound is what it does to
each scale from the inputs that the model had, and to an image from the f_hat that the model had.
What becomes of a generation left to itself is reported: two of them part at the first token that
tips, and from there on are two pictures of the same thing. Many of those are judged by
`sample_study`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.export.difference import largest_error, norm_error
from var_deploy.export.lint_int8 import Rounded, lint_int8
from var_deploy.export.reference import ScaleTrace
from var_deploy.export.report import REPORTED, Check
from var_deploy.export.verify_floats import FloatTolerance
from var_deploy.export.verify_graphs import Tensors

# ‖found - expected‖ / ‖expected‖
LOGITS_BOUND = 0.06
CACHE_BOUND = 0.06  # new keys and values
CONDITION_BOUND = 0.02  # one product: 0.012 for activations without outliers
DECODER_PSNR = 35.0  # dB against the model's image
# A decoder's ranges come from a few images, and one with values beyond them loses 10 dB and more:
# so many are drawn to meet one, if one in five is such.
DRAWN = 16
EXACT = (names.FIRST_INPUT, names.NEW_F_HAT, names.NEXT_INPUT)  # look-ups and sums, in fp32


@dataclass(frozen=True, kw_only=True)
class Int8Tolerance:
    """
    Attributes:
        exact: for what is fp32 in an int8 bundle as well.
    """

    exact: FloatTolerance
    _checked: set[Rounded] = field(default_factory=set)

    drawn: ClassVar[int] = DRAWN
    rules: ClassVar[str] = "not as int8 graphs are promised to be"

    def problems(self, path: Path) -> list[str]:
        return lint_int8(path, self._checked)

    def condition(self, check: Check, expected: Tensors, found: Tensors) -> Check:
        return self._tensors(check, expected, found, {names.MODULATION: CONDITION_BOUND})

    def scale(self, check: Check, trace: ScaleTrace, found: Tensors) -> Check:
        expected = {k: v for k, v in trace.outputs.items() if k in found and k != names.TOKENS}
        return self._tensors(check, expected, found, {names.LOGITS: LOGITS_BOUND})

    def _tensors(
        self, check: Check, expected: Tensors, found: Tensors, bounds: Mapping[str, float]
    ) -> Check:
        """The tensor nearest to its bound; names the first that leaves it."""
        failure, nearest = "", -1.0
        for tensor, want in expected.items():
            if tensor in EXACT:
                continue
            bound = bounds.get(tensor, CACHE_BOUND)
            relative = norm_error(want, found[tensor])
            if relative / bound > nearest:
                nearest = relative / bound
                error, _ = largest_error(want, found[tensor])
                check = dataclasses.replace(
                    check, tensor=tensor, error=error, relative=relative, bound=bound
                )
            if relative > bound and not failure:
                failure = f"{tensor} is off by {relative:.1%} of its norm, bound {bound:.0%}"
        if failure:
            return check.failed(failure)
        exact = {tensor: expected[tensor] for tensor in EXACT if tensor in expected}
        judged = self.exact.tensors(dataclasses.replace(check, relative=0.0), exact, found)
        return check if judged.passed else judged

    def encoder(self, check: Check, expected: Tensors, found: Tensors) -> Check:
        return self.exact.encoder(check, expected, found)

    def accumulate(self, check: Check, expected: Tensors, found: Tensors) -> Check:
        return self.exact.accumulate(check, expected, found)

    def decoder(self, check: Check) -> Check:
        check = dataclasses.replace(check, least_psnr=DECODER_PSNR)
        assert check.psnr is not None  # it has an image
        if check.psnr >= DECODER_PSNR:
            return check
        return check.failed(f"{names.IMAGE} has {check.psnr:.2f} dB, bound {DECODER_PSNR:.0f} dB")

    def loop(
        self, check: Check, traces: Sequence[ScaleTrace], tokens: Sequence[NDArray[Any]]
    ) -> Check:
        if not np.isfinite(check.error):
            return check.failed(f"{names.IMAGE} holds values that are not numbers")
        return check.remarked(REPORTED)
