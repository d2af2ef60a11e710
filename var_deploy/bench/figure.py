"""The figure of a `bench` report: launches with their rooflines, and whole generations.

matplotlib is imported only here, when a figure is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_deploy import names
from var_deploy.bench.report import BenchReport, Result, Run
from var_deploy.files import whole_file

# colours of Okabe and Ito, distinct for colour-blind readers and, in this order, in grey print
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#999999")
INK, FAINT = "#222222", "#bbbbbb"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
GROUP = 0.8  # share of the distance between two launches that bars take
MOST = 1.35  # times the longest bar: the width of the right half


def draw(report: BenchReport, path: Path) -> None:
    """Write the figure as a PNG, atomically; one row per number of images."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(report.runs)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 0.6 + 3.4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, 2, squeeze=False, width_ratios=(1.9, 1))
        for run, (left, right) in zip(report.runs, grid, strict=True):
            ran = [result for result in run.results if result.ran]
            colours = {result.name: COLOURS[n % len(COLOURS)] for n, result in enumerate(ran)}
            told = [result for result in ran if result.launches]
            _launches(left, run, told, colours)
            _generations(right, run, ran, colours)
        figure.suptitle(figure_title(report), x=0.01, ha="left", fontsize=10)
        text = {"Software": f"var-deploy bench, {report.date}"}
        with whole_file(path) as stream:
            figure.savefig(stream, format="png", metadata=text)


def figure_title(report: BenchReport) -> str:
    """The title: bundle, processor, threads, and other work that ran beside."""
    here, threads = report.surroundings, report.settings["threads"]
    count = f"threads: {threads}" if threads else f"processors: {here.processors}"
    busy = report.settings["busy"]
    processes = "1 process" if busy == 1 else f"{busy} processes"
    beside = f", beside {processes} of other work" if busy else ""
    return f"{report.name} on {here.cpu}, {count}{beside} ({' '.join(here.isa)})"


def _images(run: Run) -> str:
    return f"{run.images} images" if run.images > 1 else "one image"


def _launches(axes: Any, run: Run, told: Sequence[Result], colours: dict[str, str]) -> None:
    """Plot bars for each launch, each with a line at its roofline."""
    axes.set_title(f"Launches of {_images(run)}: median, and the floor")
    axes.set_ylabel("ms")
    axes.grid(axis="x", visible=False)
    if not told:
        axes.text(0.5, 0.5, "nobody could tell launches apart", ha="center", color=INK)
        return
    launches = list(told[0].launches)
    width = GROUP / len(told)
    roofline_label: str | None = "floor"
    for n, result in enumerate(told):
        places = [at - GROUP / 2 + (n + 0.5) * width for at in range(len(launches))]
        spreads = result.launches
        heights = [1e3 * spreads[name].median if name in spreads else 0.0 for name in launches]
        axes.bar(places, heights, 0.92 * width, color=colours[result.name], label=result.name)
        if result.rooflines:
            rooflines = {roofline.name: 1e3 * roofline.seconds for roofline in result.rooflines}
            edges = [(at - width / 2, at + width / 2) for at in places]
            axes.hlines(
                [rooflines[name] for name in launches],
                [left for left, _ in edges],
                [right for _, right in edges],
                colors=INK,
                linewidth=1.6,
                label=roofline_label,
            )
            roofline_label = None
    axes.set_xticks(range(len(launches)), [_short(name) for name in launches])
    axes.set_xlabel("condition, scales, decoder")
    axes.legend(loc="upper left")


def _generations(axes: Any, run: Run, ran: Sequence[Result], colours: dict[str, str]) -> None:
    """Plot one bar per worker, with p10 to p95 and a stroke at its roofline."""
    axes.set_title(f"{_images(run)[0].upper()}{_images(run)[1:]}, all included")
    axes.set_xlabel("ms: median, p10 to p95")
    axes.grid(axis="y", visible=False)
    # a slow round must not squeeze all bars, so a whisker may leave the figure
    widest = MOST * max(1e3 * result.whole.median for result in ran) if ran else 1.0
    axes.set_xlim(0, widest)
    axes.locator_params(axis="x", nbins=5)
    for at, result in enumerate(ran):
        whole = result.whole
        middle, low, high = (1e3 * s for s in (whole.median, whole.p10, whole.p95))
        axes.barh(at, middle, 0.6, color=colours[result.name])
        axes.hlines(at, low, high, colors=INK, linewidth=1)
        if result.rooflines:
            roofline = 1e3 * sum(roofline.seconds for roofline in result.rooflines)
            axes.vlines(roofline, at - 0.36, at + 0.36, colors=INK, linewidth=1.6)
        axes.annotate(
            f"{middle:.0f}" if middle >= 1000 else f"{middle:.4g}",
            (middle, at),
            xytext=(3, 7),
            textcoords="offset points",
        )
    axes.set_yticks(range(len(ran)), [result.name for result in ran])
    axes.invert_yaxis()


def _short(launch: str) -> str:
    """Short name of a launch: the number of a scale, "cond." or "dec."."""
    if launch in (names.CONDITION, names.DECODER):
        return {names.CONDITION: "cond.", names.DECODER: "dec."}[launch]
    return str(int(launch.rpartition("_")[2]))
