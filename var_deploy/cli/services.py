"""The text report of `var-deploy bench` on services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from var_deploy.cli.console import facts, table, wrapped

if TYPE_CHECKING:
    from var_deploy.bench.load import LoadReport

SCHEME = "http://"
TOLD = ("backend", "precision", "threads", "instances", "batch")
LEGEND = (
    "img/s: median of the rounds; ratio: of that to the first service; p50, p95: ms from a "
    "question to the last byte of its answer"
)


def load_text(report: LoadReport) -> str:
    """Return the report of a load test as text for a terminal."""
    names = [f"{n} {result.service.kind}" for n, result in enumerate(report.results, 1)]
    about = []
    for name, result in zip(names, report.results, strict=True):
        said = result.service.about
        told = [f"{what} {said[what]}" for what in TOLD if what in said]
        told.append(f"digest {said['digest'][:12]}")
        about.append((name, f"{result.service.url}: {', '.join(told)}"))
    rows = [("clients", "", "img/s", "ratio", "p50", "p95", "images")]
    first = report.results[0]
    for number, _ in enumerate(report.settings.concurrency):
        for name, result in zip(names, report.results, strict=True):
            level = result.levels[number]
            latency = level.latency
            rows.append(
                (
                    str(level.clients),
                    name,
                    f"{level.rate:.2f}",
                    f"{level.rate / first.levels[number].rate:.2f}",
                    f"{1e3 * latency.median:.1f}",
                    f"{1e3 * latency.p95:.1f}",
                    str(latency.count),
                )
            )
    levels = table(rows, right=(0, 2, 3, 4, 5, 6), optional=(6, 3))
    return "\n\n".join([facts(about), levels, wrapped(LEGEND, indent="")])
