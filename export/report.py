"""What `verify` found, for people and for machines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy.export.difference import Compared
from var_deploy.export.sample_study import SampleStudy, SkippedStudy

HEADER = (
    *("graph", "worst tensor", "abs error", "rel error", "bound", "logits", "top-1"),
    *("tokens", "PSNR", ""),
)
INT8_REMARK = (
    "int8: rel error is |found - expected| / |expected| of whole tensors; what the loops draw is "
    "reported, not bound"
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of a graph with the model.

    Attributes:
        precision, graph: what was run, such as "fp32", "scale_03" or "step @ 3".
        tensor: the tensor that came nearest to its bound, or what else was compared; "" where
            nothing could be.
        error: largest absolute difference.
        relative: fp32, fp16: the same over the largest magnitude of the expected tensor; int8:
            ‖found - expected‖ / ‖expected‖, of Frobenius norms.
        bound: the largest `relative` that passes, None where none is set.
        logits: ‖found - expected‖ / ‖expected‖ of a scale's logits, in any precision, from the
            inputs that the model had; None where there are no logits.
        top_1: places where the likeliest code is the model's, "a/b".
        tokens: tokens that agree, "a/b"; "" where there are none.
        psnr: of an image, dB.
        least_psnr: the lowest that passes, None where none is set.
        passed: whether every tensor of the graph holds.
        detail: the first thing that does not, or a remark.
    """

    precision: str
    graph: str
    tensor: str = ""
    error: float = 0.0
    relative: float = 0.0
    bound: float | None = None
    logits: float | None = None
    top_1: str = ""
    tokens: str = ""
    psnr: float | None = None
    least_psnr: float | None = None
    passed: bool = True
    detail: str = ""

    def failed(self, why: str) -> Check:
        """The same, with why it does not hold; what failed before stays the reason."""
        return dataclasses.replace(self, passed=False, detail=why) if self.passed else self

    def of_tensors(
        self, found: Sequence[Compared], complaint: Callable[[Compared], str]
    ) -> Check:
        """The same with the tensor that is nearest to its bound, of equals the last; failed with
        the complaint about the first that leaves its bound."""
        if not found:
            return self
        worst = max(reversed(found), key=lambda one: one.relative / one.bound)
        check = dataclasses.replace(self, **worst._asdict())
        beyond = [one for one in found if one.relative > one.bound]
        return check.failed(complaint(beyond[0])) if beyond else check

    def with_psnr(self, least: float) -> Check:
        """The same, bound to a PSNR of `least` dB; the check has an image's."""
        check = dataclasses.replace(self, least_psnr=least)
        assert check.psnr is not None
        if check.psnr >= least:  # written so that NaN fails
            return check
        return check.failed(f"{check.tensor} has {check.psnr:.2f} dB, bound {least:.0f} dB")

    def remarked(self, detail: str) -> Check:
        """The same with a remark, where it holds."""
        return dataclasses.replace(self, detail=detail) if self.passed else self


@dataclass(frozen=True, kw_only=True)
class Report:
    """All checks, in the order in which a generation runs the graphs.

    Attributes:
        labels, seed: of the images that were compared.
        samples: what became of many images in int8; None where int8 was not compared.
        digest: of the bundle that was compared; the report says nothing of any other.
        unstored: why the report is not in the bundle's manifest, "" where it is.
    """

    checks: tuple[Check, ...]
    labels: tuple[int, ...]
    seed: int
    samples: SampleStudy | SkippedStudy | None = None
    digest: str = ""
    unstored: str = ""

    @property
    def passed(self) -> bool:
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """The first failure in one line, None if everything holds."""
        lines = [f"{c.precision}/{c.graph}: {c.detail}" for c in self.checks if not c.passed]
        if self.samples and self.samples.failure:
            lines.append(f"int8 samples: {self.samples.failure}")
        if not lines:
            return None
        more = f" ({len(lines) - 1} more checks fail)" if len(lines) > 1 else ""
        return lines[0] + more

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in the manifest."""
        return {
            "passed": self.passed,
            "failure": self.failure,
            "labels": list(self.labels),
            "seed": self.seed,
            "digest": self.digest,
            "checks": [
                {k: _plain(v) for k, v in dataclasses.asdict(check).items()}
                for check in self.checks
            ],
            "samples": self.samples.to_json() if self.samples else None,
        }

    def table(self) -> str:
        """A table with a line a graph, and what the samples showed."""
        rows = [HEADER, *(_row(check) for check in self.checks)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        if any(check.precision == "int8" for check in self.checks):
            lines += ["", INT8_REMARK]
        if self.samples:
            lines += ["", self.samples.text()]
        verdict = "the deployed graphs are the model" if self.passed else f"FAILED {self.failure}"
        return "\n".join(line.rstrip() for line in [*lines, "", verdict])


def _plain(value: Any) -> Any:
    """JSON has no infinity: an error beyond all numbers is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(check: Check) -> tuple[str, ...]:
    measured = check.tensor != ""
    bound = "" if check.bound is None else f"{check.bound:.0e}"
    return (
        f"{check.precision}/{check.graph}",
        check.tensor,
        f"{check.error:.2e}" if measured else "",
        f"{check.relative:.2e}" if measured else "",
        bound if check.least_psnr is None else f"{check.least_psnr:.0f} dB",
        "" if check.logits is None else f"{check.logits:.1e}",
        check.top_1,
        check.tokens,
        "" if check.psnr is None else f"{check.psnr:.1f} dB",
        ("ok " if check.passed else "FAIL ") + check.detail,
    )
