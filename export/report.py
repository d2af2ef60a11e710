"""What `verify` found, for people and for machines."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of a graph with the model.

    Attributes:
        precision, graph: what was run, such as "fp32", "scale_03" or "step @ 3".
        tensor: the tensor with the largest relative error, or what else was compared.
        error: largest absolute difference.
        relative: the same over the largest magnitude of the expected tensor.
        bound: the largest `relative` that passes.
        tokens: tokens that agree, "a/b"; "" where there are none.
        passed: whether every tensor of the graph holds.
        detail: the first thing that does not, or a remark.
    """

    precision: str
    graph: str
    tensor: str = ""
    error: float = 0.0
    relative: float = 0.0
    bound: float = 0.0
    tokens: str = ""
    psnr: float | None = None
    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All checks, in the order in which a generation runs the graphs."""

    checks: tuple[Check, ...]
    labels: tuple[int, ...]
    seed: int

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failure(self) -> str | None:
        """The first graph and tensor that leave the tolerance, in one line."""
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return None
        first = failed[0]
        more = f" ({len(failed) - 1} more checks fail)" if len(failed) > 1 else ""
        return f"{first.precision}/{first.graph}: {first.detail}{more}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in the manifest."""
        return {
            "passed": self.passed,
            "failure": self.failure,
            "labels": list(self.labels),
            "seed": self.seed,
            "checks": [
                {k: _plain(v) for k, v in dataclasses.asdict(check).items()}
                for check in self.checks
            ],
        }

    def table(self) -> str:
        """A table with a line a graph."""
        header = ("graph", "worst tensor", "abs error", "rel error", "bound", "tokens", "PSNR", "")
        rows = [header, *(_row(check) for check in self.checks)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        verdict = "the deployed graphs are the model" if self.passed else f"FAILED {self.failure}"
        return "\n".join(line.rstrip() for line in [*lines, "", verdict])


def _plain(value: Any) -> Any:
    """JSON has no infinity: an error beyond all numbers is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(check: Check) -> tuple[str, ...]:
    measured = check.bound > 0
    return (
        f"{check.precision}/{check.graph}",
        check.tensor,
        f"{check.error:.2e}" if measured else "",
        f"{check.relative:.2e}" if measured else "",
        f"{check.bound:.0e}" if measured else "",
        check.tokens,
        "" if check.psnr is None else f"{check.psnr:.1f} dB",
        ("ok " if check.passed else "FAIL ") + check.detail,
    )
