"""Tolerances for fp32 and fp16: everything must agree with the model, but for rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.graph_refs import GraphRef
from var_deploy.export.lint.tensorrt import lint_file
from var_deploy.export.verify.difference import TensorDifference, largest_error, place_of_error
from var_deploy.export.verify.graphs import Tensors
from var_deploy.export.verify.reference import ScaleTrace
from var_deploy.export.verify.report import REPORTED, Check

# One code that rounding tips changes the residuals of all later scales, so in fp32 the encoder's
# tokens must agree all but for such a tip; in fp16 the latent alone is bound.
SHARE_OF_ENCODED = 0.98


@dataclass(frozen=True, kw_only=True)
class FloatTolerance:
    """Bounds of one float precision.

    Attributes:
        bound: largest difference of any tensor over the largest magnitude of what was expected.
        image_bound: largest absolute difference of an image.
        coin_toss: how close to the end of its interval the uniform of a differing token may lie.
        mixed_psnr: where codes are mixed: least dB of a free-running generation, whose tokens then
            decide nothing.
    """

    precision: str
    bound: float
    image_bound: float
    coin_toss: float
    mixed_psnr: float | None = None

    rules: ClassVar[str] = "not for TensorRT 10.3"
    drawn: ClassVar[int] = 0

    def problems(self, graph: GraphRef, path: Path) -> list[str]:
        return lint_file(path, graph)

    def condition(self, check: Check, expected: Tensors, found: Tensors) -> Check:
        return self.tensors(check, expected, found)

    def tensors(self, check: Check, expected: Tensors, found: Tensors) -> Check:
        """Fill the check with the largest error over all tensors; name the first beyond its
        bound."""

        def complaint(one: TensorDifference) -> str:
            place = place_of_error(expected[one.tensor], found[one.tensor])
            off = f"{one.tensor} is off by {one.relative:.2e} at [{place}]"
            return f"{off}, bound {one.bound:.0e}"

        compared = [
            TensorDifference(tensor, *largest_error(want, found[tensor]), self.bound)
            for tensor, want in expected.items()
        ]
        return check.of_tensors(compared, complaint)

    def scale(self, check: Check, trace: ScaleTrace, found: Tensors) -> Check:
        check = self.tensors(check, trace.compared(found), found)
        differ = found[names.TOKENS] != trace.outputs[names.TOKENS]
        margin = float(trace.margins[differ].max(initial=0.0))
        if margin > self.coin_toss:
            return check.failed(f"{names.TOKENS} differ beyond rounding (margin {margin:.1e})")
        if differ.any():
            count = int(differ.sum())
            return check.remarked(f"{count} tokens differ by rounding (margin {margin:.1e})")
        return check

    def encoder(self, check: Check, expected: Tensors, found: Tensors) -> Check:
        latent = {names.LATENT: expected[names.LATENT]}
        check = self.tensors(check, latent, found)
        tokens = [name for name in found if name != names.LATENT]
        agree = sum(int((found[name] == expected[name]).sum()) for name in tokens)
        total = sum(found[name].size for name in tokens)
        check = dataclasses.replace(check, tokens=f"{agree}/{total}")
        if self.precision != "fp16" and agree < SHARE_OF_ENCODED * total:
            return check.failed(f"tokens of the encoder differ in {total - agree} of {total}")
        return check

    def accumulate(self, check: Check, expected: Tensors, found: Tensors) -> Check:
        return self.tensors(check, expected, found)

    def decoder(self, check: Check) -> Check:
        check = dataclasses.replace(check, bound=self.image_bound)
        if check.error <= self.image_bound:
            return check
        return check.failed(
            f"{names.IMAGE} is off by {check.error:.2e}, bound {self.image_bound:.0e}"
        )

    def loop(
        self, check: Check, traces: Sequence[ScaleTrace], tokens: Sequence[NDArray[Any]]
    ) -> Check:
        if self.mixed_psnr is not None:
            return check.with_psnr(self.mixed_psnr)
        for scale, (trace, found) in enumerate(zip(traces, tokens, strict=True)):
            differ = found != trace.outputs[names.TOKENS]
            if differ.any():  # everything after a differing token belongs to another image
                margin = float(trace.margins[differ].max())
                told = f"tokens part at scale {scale} {{}} (margin {margin:.1e})"
                if margin > self.coin_toss:
                    return check.failed(told.format("beyond rounding"))
                return check.remarked(f"{told.format('by rounding')}: image {REPORTED}")
        return self.decoder(check)
