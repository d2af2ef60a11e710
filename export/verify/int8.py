"""Tolerance for int8: close enough to generate pictures of the same things.

Quantisation to 8 bits changes every token's logits, so single values cannot be bounded. Bounded are
the error of each scale from the inputs that the model had, and the error of an image from the f_hat
that the model had. A free-running generation is only reported: it parts from the model's at the
first token that differs, and from there on shows another picture of the same thing.
`verify.samples` evaluates many of those with a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.graph_refs import GraphRef
from var_deploy.export.lint.int8 import Rounded, lint_int8
from var_deploy.export.verify.difference import TensorDifference, largest_error, norm_error
from var_deploy.export.verify.floats import FloatTolerance
from var_deploy.export.verify.graphs import Tensors
from var_deploy.export.verify.reference import ScaleTrace
from var_deploy.export.verify.report import REPORTED, Check

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
class Int8Tolerance(FloatTolerance):
    """Bounds for the quantised tensors; encoder, `accumulate` and the tensors in `EXACT` are fp32
    in an int8 bundle as well, and have the bounds of fp32."""

    _checked: set[Rounded] = field(default_factory=set)

    drawn: ClassVar[int] = DRAWN
    rules: ClassVar[str] = "not as int8 graphs are promised to be"

    def problems(self, graph: GraphRef, path: Path) -> list[str]:
        return lint_int8(path, self._checked)

    def condition(self, check: Check, expected: Tensors, found: Tensors) -> Check:
        return self._rounded(check, expected, found, {names.MODULATION: CONDITION_BOUND})

    def scale(self, check: Check, trace: ScaleTrace, found: Tensors) -> Check:
        return self._rounded(check, trace.compared(found), found, {names.LOGITS: LOGITS_BOUND})

    def _rounded(
        self, check: Check, expected: Tensors, found: Tensors, bounds: Mapping[str, float]
    ) -> Check:
        """Return the tensor nearest to its bound; name the first beyond it."""
        compared = [
            TensorDifference(
                tensor=tensor,
                error=largest_error(want, found[tensor])[0],
                relative=norm_error(want, found[tensor]),
                bound=bounds.get(tensor, CACHE_BOUND),
            )
            for tensor, want in expected.items()
            if tensor not in EXACT
        ]
        check = check.of_tensors(
            compared,
            lambda one: (
                f"{one.tensor} is off by {one.relative:.1%} of its norm, bound {one.bound:.0%}"
            ),
        )
        exact = {tensor: expected[tensor] for tensor in EXACT if tensor in expected}
        evaluated = self.tensors(check, exact, found)
        return evaluated if check.passed and not evaluated.passed else check

    def decoder(self, check: Check) -> Check:
        return check.with_psnr(DECODER_PSNR)

    def loop(
        self, check: Check, traces: Sequence[ScaleTrace], tokens: Sequence[NDArray[Any]]
    ) -> Check:
        if not np.isfinite(check.error):
            return check.failed(f"{names.IMAGE} holds values that are not numbers")
        return check.remarked(REPORTED)
