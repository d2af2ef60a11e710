"""The report of `verify`, as text and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy.export.verify.difference import TensorDifference
from var_deploy.export.verify.samples import SampleStudy, SkippedStudy

HEADER = (
    *("graph", "worst tensor", "abs error", "rel error", "bound", "logits", "top-1"),
    *("tokens", "PSNR", ""),
)
INT8_REMARK = (
    "int8: rel error is |found - expected| / |expected| of whole tensors; tokens, top-1 and what "
    "the loops draw are reported, not bounded"
)
REPORTED = "reported, not bounded"
LOOP = "loop "  # the beginning of the name of a check of whole generations


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
        """Return the check as failed, with the reason; a check that failed before keeps its
        reason."""
        return dataclasses.replace(self, passed=False, detail=why) if self.passed else self

    def of_tensors(
        self, found: Sequence[TensorDifference], complaint: Callable[[TensorDifference], str]
    ) -> Check:
        """Return the check with the tensor that is nearest to its bound, of equals the last.

        It fails with the complaint about the first tensor beyond its bound.
        """
        if not found:
            return self
        worst = max(reversed(found), key=lambda one: one.relative / one.bound)
        check = dataclasses.replace(self, **worst._asdict())
        beyond = [one for one in found if one.relative > one.bound]
        return check.failed(complaint(beyond[0])) if beyond else check

    def with_psnr(self, least: float) -> Check:
        """Return the check with a lower bound of `least` dB on its PSNR."""
        check = dataclasses.replace(self, least_psnr=least)
        assert check.psnr is not None
        if check.psnr >= least:  # written so that NaN fails
            return check
        return check.failed(f"{check.tensor} has {check.psnr:.2f} dB, bound {least:.0f} dB")

    @property
    def nearness(self) -> float:
        """Return the measured value over its bound: 1 at the bound, more beyond it."""
        if self.least_psnr is not None:
            return self.least_psnr / self.psnr if self.psnr and self.psnr > 0 else math.inf
        if self.bound is None:
            return self.relative
        found = self.relative / self.bound
        return math.inf if math.isnan(found) else found

    def remarked(self, detail: str) -> Check:
        """Return the check with a remark, where it passed."""
        return dataclasses.replace(self, detail=detail) if self.passed else self


def merged(checks: Sequence[Check]) -> Check:
    """Merge checks of one graph on several images into the one that is nearest to its bound.

    The merged check has the tokens of all, and the first failure or remark, which says of which
    images it is.
    """
    wrong = [n for n, check in enumerate(checks) if not check.passed]
    # an image whose tokens differ is another picture: its bound says nothing of the others
    unbounded = [c for c in checks if c.bound is None and c.least_psnr is None]
    chosen = checks[wrong[0]] if wrong else max(unbounded or checks, key=lambda c: c.nearness)
    told = wrong or [n for n, check in enumerate(checks) if check.detail]
    detail = checks[told[0]].detail if told else ""
    if len(checks) > 1 and told and any(check.detail != detail for check in checks):
        detail += f" (image {told[0] + 1} of {len(checks)})"
    logits = [check.logits for check in checks if check.logits is not None]
    psnrs = [check.psnr for check in checks if check.psnr is not None]
    return dataclasses.replace(
        chosen,
        detail=detail,
        logits=max(logits, default=None),
        psnr=min(psnrs, default=None),
        tokens=_total([check.tokens for check in checks]),
        top_1=_total([check.top_1 for check in checks]),
    )


def _total(counts: Sequence[str]) -> str:
    """Add fractions: "3/4" and "5/6" → "8/10"; "" where no tokens are counted."""
    pairs = [tuple(map(int, count.split("/"))) for count in counts if count]
    if not pairs:
        return ""
    return f"{sum(a for a, _ in pairs)}/{sum(b for _, b in pairs)}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All checks of a verification, in the order in which a generation runs the graphs.

    Attributes:
        labels, seed: of the images that were compared, one label per image; no labels where they
            were made of prompts.
        images: how many were compared; None: one per label.
        oracle: whose forward they were compared with: "" for the PyTorch model of the bundle's
            checkpoint, else the class of the modules that were given.
        samples: what became of many images in int8; None where int8 was not compared.
        digest: of the bundle that was compared; the report says nothing of any other.
        unstored: why the report is not in the bundle's manifest, "" where it is.
    """

    checks: tuple[Check, ...]
    labels: tuple[int, ...]
    seed: int
    samples: SampleStudy | SkippedStudy | None = None
    oracle: str = ""
    digest: str = ""
    unstored: str = ""
    images: int | None = None

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
        """Return plain JSON values, as stored in the manifest."""
        return {
            "passed": self.passed,
            "failure": self.failure,
            "verdict": self.verdict(),
            "oracle": self.oracle,
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
        """Return a text table with one line per graph, the sample study, and the verdict."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join(line.rstrip() for line in [*lines, *self.remarks()])

    def rows(self) -> list[tuple[str, ...]]:
        """HEADER, and a row for every check."""
        return [HEADER, *(_row(check) for check in self.checks)]

    def remarks(self) -> list[str]:
        """The lines below the table; the last ones are the verdict."""
        lines: list[str] = []
        if any(check.precision == "int8" for check in self.checks):
            lines += ["", INT8_REMARK]
        if self.samples:
            lines += ["", *self.samples.text().splitlines()]
        return [*lines, "", *self.verdict()]

    def verdict(self) -> list[str]:
        """Say what was shown, one line per precision; one line of failure where a check fails."""
        if not self.passed:
            return [f"FAILED {self.failure}"]
        by_precision: dict[str, list[Check]] = {}
        for check in self.checks:
            if check.graph.startswith(LOOP):
                by_precision.setdefault(check.precision, []).append(check)
        return [self._verdict(name, loops) for name, loops in by_precision.items()]

    def _verdict(self, precision: str, loops: Sequence[Check]) -> str:
        """Say what the whole generations of one precision show: that of the layout that agrees
        least."""
        agree, total = min(tuple(map(int, c.tokens.split("/"))) for c in loops)
        count = len(self.labels) if self.images is None else self.images
        images = "1 image" if count == 1 else f"{count} images"
        whose = f"those of {self.oracle}" if self.oracle else "the PyTorch model's"
        shown = f"{agree} of {total} tokens of {images} equal {whose}"
        within = f"within the bounds for {precision}"
        if precision == "int8":
            psnr = min(c.psnr for c in loops if c.psnr is not None)
            if agree < total:
                within += f"; it draws other images than fp32 ({shown}, {psnr:.1f} dB)"
            else:
                within += f" ({shown}, {psnr:.1f} dB)"
            return f"{precision}: {within}"
        error = max(c.error for c in loops)
        if agree < total:
            return f"{precision}: {shown}, rounding decided the others: {within}"
        equal = f"{precision}: {shown}, images within {error:.1e}"
        if precision == "fp32":
            return f"{equal}: the deployed graphs are the model"
        return f"{equal}: {within}"


def _plain(value: Any) -> Any:
    """Return None for an infinite number, which JSON does not have."""
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
