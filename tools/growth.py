"""Measures how time and memory grow with depth, batch, threads and the side of the image.

    python -m tools.growth --json growth.json --plot docs/growth.png

Exports random weights of each size into a folder that is deleted again, benches them one after the
other on the CPU, and writes what docs/BENCHMARKS.md shows. The whole series takes most of an hour
on two cores; `--only depth,threads` does a part.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from var_deploy.bench.figure import COLOURS, INK, STYLE
from var_deploy.bench.run import Settings, bench
from var_deploy.config import CPU, Precision, RuntimeConfig
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import random_model
from var_deploy.export.checkpoint.presets import PATCH_NUMS_512, PRESETS
from var_deploy.files import whole_file
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
# thread count of the speed goals in docs/BENCHMARKS.md
SAMPLING = Sampling(cfg=4.0, top_k=900, top_p=0.96)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of a measured series.

    Attributes:
        series: what is varied; `value`: where this point stands on that axis.
        threads: None leaves them to the runtime.
    """

    series: str
    value: int
    spec: ModelSpec
    batch: int = 1
    threads: int | None = None

    @property
    def bundle(self) -> tuple[ModelSpec, int]:
        """Key of the export that a case runs from; cases with equal keys share one export."""
        return self.spec, self.batch


def all_cases() -> Iterator[Case]:
    d16 = PRESETS["var-d16"].spec
    for depth in (16, 20, 24):
        yield Case(series="depth", value=depth, spec=PRESETS[f"var-d{depth}"].spec)
    for batch in (1, 2, 4, 8):
        yield Case(series="batch", value=batch, spec=d16, batch=batch)
    for threads in (1, 2):
        yield Case(series="threads", value=threads, spec=d16, threads=threads)
    # the released 512 px model shares its AdaLN and has 36 blocks; here with the blocks of d16
    large = dataclasses.replace(
        d16,
        tokenizer=dataclasses.replace(d16.tokenizer, patch_nums=PATCH_NUMS_512),
        transformer=dataclasses.replace(d16.transformer, shared_adaln=True),
    )
    small = dataclasses.replace(large, tokenizer=d16.tokenizer)
    for spec in (small, large):
        yield Case(series="side", value=spec.tokenizer.image_side, spec=spec)


def measure(
    cases: Iterable[Case], folder: Path, *, repeat: int = 3, warm_up: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield a row per case and precision as it is measured; exports go to `folder` and are deleted.

    Seconds and bytes are those of one generation of `batch` images.
    """
    groups: dict[tuple[ModelSpec, int], list[Case]] = {}
    for case in cases:
        groups.setdefault(case.bundle, []).append(case)
    for (spec, batch), members in groups.items():
        with tempfile.TemporaryDirectory(dir=folder) as name:
            bundle = Path(name) / "bundle"
            model = random_model(spec, 0, defaults=SAMPLING)
            options = ExportOptions(
                precisions=PRECISIONS,
                batch=batch,
                layout="shared",
                calibration=1,  # ranges do not move the time
            )
            export_bundle(model, bundle, options)
            for threads in dict.fromkeys(case.threads for case in members):
                settings = Settings(
                    batches=(batch,),
                    configs=tuple(
                        RuntimeConfig(backend=CPU, precision=precision, threads=threads)
                        for precision in PRECISIONS
                    ),
                    repeat=repeat,
                    warm_up=warm_up,
                )
                report = bench(bundle, settings).to_json()
                for case in members:
                    if case.threads == threads:
                        yield from _rows(case, report)


def _rows(case: Case, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    (run,) = report["runs"]
    for precision, found in zip(PRECISIONS, run["contenders"], strict=True):
        point = {"series": case.series, "value": case.value, "precision": precision}
        if found["problem"]:
            yield {**point, "problem": found["problem"]}
            continue
        floor = found["floor"]
        yield {
            **point,
            "ms": found["generation"]["median_ms"],
            "floor_ms": floor and floor["floor_ms"],
            "peak_pss": found["memory"]["peak_pss"],
            "weights": found["memory"]["weights"],
            "cold_s": found["cold_s"],
        }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the Markdown table of docs/BENCHMARKS.md."""
    lines = [
        "| | | generation | roofline | reached | peak PSS | over its weights | cold |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['series']} {row['value']} | {row['precision']} |"
        if "problem" in row:
            lines.append(f"{start} {row['problem']} | | | | | |")
            continue
        seconds, floor, peak = row["ms"] / 1e3, row["floor_ms"], row["peak_pss"]
        cells = [
            f"{seconds:.2f} s",
            f"{floor / 1e3:.2f} s" if floor else "unknown",
            f"{floor / row['ms']:.0%}" if floor else "",
            f"{peak / 2**20:.0f} MiB" if peak else "unknown",
            f"{peak / row['weights']:.2f}" if peak else "",
            f"{row['cold_s']:.1f} s" if row["cold_s"] else "unknown",
        ]
        lines.append(f"{start} {' | '.join(cells)} |")
    return lines


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot time and memory of each series side by side; strokes show rooflines and weights."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [row for row in rows if "problem" not in row]
    series = list(dict.fromkeys(row["series"] for row in known))
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(series) + 1, 5.4), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, len(series), squeeze=False)
        for column, name in enumerate(series):
            points = [row for row in known if row["series"] == name]
            _panel(grid[0][column], points, "ms", "floor_ms", 1e-3)
            _panel(grid[1][column], points, "peak_pss", "weights", 2.0**-30)
            grid[1][column].set_xlabel(name)
        grid[0][0].set_ylabel("s a generation; stroke: roofline")
        grid[1][0].set_ylabel("GiB of PSS; stroke: weights")
        grid[0][0].legend(loc="upper left")
        figure.savefig(path)


def _panel(axes: Any, points: Sequence[dict[str, Any]], high: str, low: str, unit: float) -> None:
    """Plot bars of `high`, a group per value, and over each a stroke at `low`."""
    values = list(dict.fromkeys(row["value"] for row in points))
    width = 0.8 / len(PRECISIONS)
    axes.grid(axis="x", visible=False)
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    for n, precision in enumerate(PRECISIONS):
        mine = [row for row in points if row["precision"] == precision]
        places = [values.index(row["value"]) - 0.4 + (n + 0.5) * width for row in mine]
        heights = [unit * (row[high] or 0) for row in mine]
        axes.bar(places, heights, 0.92 * width, color=COLOURS[n], label=precision)
        for place, row in zip(places, mine, strict=True):
            if row[low]:
                ends = place - width / 2, place + width / 2
                axes.hlines(unit * row[low], *ends, colors=INK, linewidth=1.6)


@click.command()
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--only", default="depth,batch,threads,side", show_default=True, metavar="LIST")
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="For the exports, several GB; the system's own by default.",
)
def main(out: Path, plot: Path | None, only: str, repeat: int, folder: Path | None) -> None:
    """Measure how time and memory grow on this CPU; rows go to FILE as they come."""
    wanted = only.split(",")
    cases = [case for case in all_cases() if case.series in wanted]
    if not cases:
        raise click.UsageError("--only must name some of depth, batch, threads, side")
    rows: list[dict[str, Any]] = []
    for row in measure(cases, folder or Path(tempfile.gettempdir()), repeat=repeat):
        rows.append(row)
        with whole_file(out) as stream:
            stream.write(f"{json.dumps(rows, indent=1)}\n".encode())
    click.echo("\n".join(table(rows)))
    if plot is not None:
        draw(rows, plot)


if __name__ == "__main__":
    main()
