"""`var-deploy bench`: times a bundle, other runtimes, and the roofline of the machine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from var_deploy.cli.console import ProgressBar, echo, echo_json, human_bytes, table, wrapped
from var_deploy.cli.options import MOST_BATCH, MOST_ROUNDS, quiet_option, verbose_option
from var_deploy.cli.outputs import STDOUT, refusal
from var_deploy.cli.services import SCHEME, load_text
from var_deploy.config import BACKENDS, LAYOUT_CHOICES, PRECISIONS, RuntimeConfig
from var_deploy.errors import BackendError, UsageError, VarDeployError
from var_deploy.files import check_writable, whole_file
from var_deploy.host.installation import pip_install
from var_deploy.host.terminal import visible_json

if TYPE_CHECKING:
    from var_deploy.bench.report import BenchReport, Result, Run

LEGEND = (
    "ms: median; ratio: to the first; host: share of the time outside of the graphs; floor: the "
    "least time at the measured rates, as a share of the time taken; cold: from the start of the "
    "process to its first image; peak PSS: of the whole process, alone on the machine"
)


OF_BUNDLES = ("precision", "backend", "layout", "batch", "threads", "busy", "plot")
OF_SERVICES = ("concurrency",)
MOST_BUSY = 256  # more would measure how the system switches between processes


class BundleOrUrl(click.Path):
    """A folder as a Path, or the address of a service as it was typed."""

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> Any:
        return value if str(value).startswith(SCHEME) else super().convert(value, param, ctx)


@click.command()
@click.argument("bundle", type=BundleOrUrl(path_type=Path, file_okay=False))
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    metavar="LIST",
    help="Of our own graphs, as in fp32,fp16; each is timed.",
)
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="What runs our own graphs, as for generate.",
)
@click.option(
    "--layout",
    default="auto",
    show_default=True,
    metavar="LIST",
    help="Of our own graphs, as in per-scale,shared; each is timed.",
)
@click.option(
    "--against",
    default="",
    show_default="none",
    metavar="LIST",
    help="Others to time beside: torch, torch-bf16, torch-compile, openvino, openvino-bf16; of a "
    "service, the addresses of others.",
)
@click.option(
    "--batch",
    default="1",
    show_default=True,
    metavar="LIST",
    help="Images a generation, as in 1,4; ours makes them in the bundle's batches.",
)
@click.option(
    "--threads", type=click.IntRange(1), show_default="each library's own", help="CPU threads."
)
@click.option(
    "--busy",
    type=click.IntRange(0, MOST_BUSY),
    default=0,
    show_default=True,
    metavar="N",
    help="Processes of other work that compute beside everything that is measured.",
)
@click.option(
    "--concurrency",
    default="1,4,16",
    show_default=True,
    metavar="LIST",
    help="Clients of a service, each of which asks again once it was answered.",
)
@click.option(
    "--repeat", type=click.IntRange(1, MOST_ROUNDS), default=10, show_default=True, help="Rounds."
)
@click.option(
    "--warm-up",
    type=click.IntRange(0, MOST_ROUNDS),
    default=2,
    show_default=True,
    help="Rounds before those.",
)
@click.option("--json", "json_out", metavar="FILE", help="The report as JSON; - is stdout.")
@click.option("--plot", metavar="FILE.png", help="The report as a figure.")
@quiet_option(help="No progress and no tables.")
@verbose_option()
@click.pass_context
def bench(
    ctx: click.Context,
    bundle: Path | str,
    precision: str,
    backend: str,
    layout: str,
    against: str,
    batch: str,
    threads: int | None,
    busy: int,
    concurrency: str,
    repeat: int,
    warm_up: int,
    json_out: str | None,
    plot: str | None,
    quiet: bool,
) -> None:
    """Time BUNDLE launch by launch, beside other runtimes and the floor; or a service.

    Everything runs in a process of its own; all of them take turns, so that a slow minute of the
    machine hits all alike. The rates of this machine are measured in between; the floor is what
    the bundle's operations and bytes take at these rates. Whatever is compared but not installed
    is left out, with the reason.

    A text-to-image bundle generates from random text features; its text encoder, where it is
    there, is timed in a line of its own.

    In place of BUNDLE an address is that of a service: of var-deploy serve, or of a model of
    Triton. It gets images asked for, each of a seed of its own, by --concurrency clients at a
    time; its throughput and latency are told. Each image of a service that takes prompts has a
    prompt of its own, so that its text encoder works too.

    \b
    Example:
      var-deploy bench build/pocket
      var-deploy bench http://127.0.0.1:8000 --concurrency 1,4,16
      var-deploy bench http://127.0.0.1:9000 --against http://127.0.0.1:8000/v2/models/pocket
      var-deploy bench build/d16 --against torch,openvino --repeat 20 --plot d16.png
      var-deploy bench build/d16 --batch 1,4 --threads 2 --json report.json
    """
    target = None if json_out in (None, "-") else _file(Path(str(json_out)))
    if isinstance(bundle, str):
        _refuse(ctx, OF_BUNDLES, "the address of a service")
        from var_deploy.bench.load import LoadSettings, load_services
        from var_deploy.bench.service import find_service

        load = LoadSettings(
            concurrency=_numbers("--concurrency", concurrency), repeat=repeat, warm_up=warm_up
        )
        others = [url.strip() for url in against.split(",") if url.strip()]
        services = [find_service(url) for url in dict.fromkeys([bundle, *others])]
        with ProgressBar(quiet=quiet) as progress:
            found = load_services(services, load, progress.update)
        _tell(found.to_json(), lambda: load_text(found), json_out, target, quiet)
        return
    _refuse(ctx, OF_SERVICES, "a bundle")
    from var_deploy.bench.run import PEERS, Settings
    from var_deploy.bench.run import bench as run

    runner = _known("--backend", backend, BACKENDS)[0]
    settings = Settings(
        batches=_numbers("--batch", batch),
        configs=tuple(
            RuntimeConfig(precision=each, backend=runner, layout=one, threads=threads)
            for each in _known("--precision", precision, PRECISIONS)
            for one in _known("--layout", layout, LAYOUT_CHOICES)
        ),
        against=_known("--against", against, PEERS) if against.strip() else (),
        repeat=repeat,
        warm_up=warm_up,
        busy=busy,
    )
    figure = _figure(plot) if plot is not None else None
    with ProgressBar(quiet=quiet) as progress:
        report = run(bundle, settings, progress=progress.update)
    if figure is not None:
        from var_deploy.bench.figure import draw

        draw(report, figure)
    _tell(report.to_json(), lambda: _as_text(report), json_out, target, quiet)
    if report.failed:
        first = report.failed[0]
        raise BackendError(f"{first.name} did not run: {first.problem}")


def _refuse(ctx: click.Context, options: Collection[str], what: str) -> None:
    """Raise UsageError for an option that was typed and means nothing for `what`."""
    for name in options:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name} means nothing for {what}; leave it out")


def _tell(
    data: dict[str, Any],
    as_text: Callable[[], str],
    json_out: str | None,
    target: Path | None,
    quiet: bool,
) -> None:
    """Write a report where it was asked for; `target` is the file of --json, if it is one."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    try:
        if target is not None:
            with _stream(target) as stream:
                stream.write(f"{visible_json(text)}\n".encode())
    finally:  # minutes went into it: it is told where the disk refuses as well
        if json_out == "-":
            echo_json(data)
        elif not quiet:
            echo(as_text())


def _stream(target: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file, whole or not at all; or a device or pipe, such as /dev/stdout, written as it is."""
    if target.exists() and not target.is_file():
        return target.open("wb")
    return whole_file(target)


def _known(option: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """The words of a list, each once."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in known:
            raise UsageError(f"{option} takes {', '.join(known)}; found {word!r}")
    return words


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1 or max(numbers) > MOST_BATCH:
        raise UsageError(
            f"{option} takes numbers from 1 to {MOST_BATCH}, as in 1,4; found {text!r}"
        )
    return numbers


def _file(path: Path) -> Path:
    """The same path, once it is sure that a file can be written there."""
    if path in (Path(), Path(STDOUT)):
        raise UsageError(refusal("" if path == Path() else STDOUT))
    if os.path.isdir(path):  # unlike Path.is_dir, it takes a name that is too long
        raise UsageError(f"{path} is a folder; name a file")
    if not (os.path.exists(path) and not os.path.isfile(path)):
        check_writable(path)
    return path


def _figure(plot: str) -> Path:
    """Likewise, and that it can be drawn."""
    path = _file(Path(plot))
    if path.suffix.lower() != ".png":
        raise UsageError(f"figures are written as .png, found {path.name}")
    if importlib.util.find_spec("matplotlib") is None:
        raise VarDeployError(
            f"--plot needs matplotlib, which is not installed; run {pip_install('bench')}"
        )
    return path


# the report on a terminal


def _as_text(report: BenchReport) -> str:
    parts = [_facts(report)]
    for run in report.runs:
        parts += [f"{_count(run.images, 'image')} a generation", _measured(run)]
        parts += [_cold_starts(run), _rates(run), _launches(run), _notes(run)]
    parts.append(_wrapped("", LEGEND))
    return "\n\n".join(part for part in parts if part)


def _count(number: int, what: str, plural: str = "") -> str:
    return f"{number} {what if number == 1 else plural or f'{what}s'}"


def _facts(report: BenchReport) -> str:
    here, manifest, settings = report.surroundings, report.manifest, report.settings
    threads = settings["threads"] or "as each library takes them"
    memory = f", {human_bytes(here.memory)}" if here.memory else ""
    guidance = "on" if manifest.guidance else "off"
    rows = {
        "bundle": f"{report.name}: {manifest.preset or 'no preset'}, "
        f"{_count(manifest.batch, 'image')} a launch, guidance {guidance}, digest "
        f"{manifest.digest()[:12]}",
        "machine": f"{here.cpu}, {_count(here.processors, 'processor')}{memory}; "
        f"{' '.join(here.isa) or 'no vector units that matter'}",
        "system": f"{here.system}; Python {here.python}",
        "sampling": str(manifest.defaults),
        "run": f"{_count(settings['repeat'], 'round')} in turn after {settings['warm_up']} to warm "
        f"up, threads: {threads}; {report.date}",
    }
    if settings["busy"]:
        rows["busy"] = f"{_count(settings['busy'], 'process', 'processes')} of other work beside"
        rows["busy"] += " everything that was measured"
    return "\n".join(_wrapped(name.ljust(10), text) for name, text in rows.items())


def _measured(run: Run) -> str:
    rows: list[tuple[str, ...]] = [
        (
            "", "ms", "p10", "p95", "img/s", "ratio", "host", "floor",
            "cold s", "peak PSS", "/weights", "J/img",
        )
    ]  # fmt: skip
    first = run.first
    for result in run.results:
        if result.ran and first is not None:
            rows.append(_row(result, run.images, first))
        else:
            rows.append((result.name, *["–"] * (len(rows[0]) - 1)))
    return table(rows, right=range(1, len(rows[0])), optional=(2, 10, 11, 3, 6, 8, 9))


def _row(result: Result, images: int, first: Result) -> tuple[str, ...]:
    whole, joules = result.whole, result.energy.joules
    return (
        result.name,
        *(_milliseconds(seconds) for seconds in (whole.median, whole.p10, whole.p95)),
        _short(images / whole.median),
        f"{whole.median / first.whole.median:.2f}",
        _percent(result.host_share),
        _percent(result.reached),
        "–" if result.cold is None else f"{result.cold:.2f}",
        "unknown" if result.peak is None else human_bytes(result.peak),
        "–" if result.peak_over_weights is None else f"{result.peak_over_weights:.2f}",
        "unknown" if joules is None else _short(joules),
    )


def _cold_starts(run: Run) -> str:
    """A table of the parts of each cold start, one row per worker that tells them."""
    told = [result for result in run.results if result.cold is not None and result.cold_parts]
    if not told:
        return ""
    rows = [("cold start, s", *told[0].cold_parts, "all", "/ warm")]
    for result in told:
        ratio = result.cold_over_warm
        rows.append(
            (
                result.name,
                *(f"{result.cold_parts.get(part, 0.0):.2f}" for part in told[0].cold_parts),
                f"{result.cold:.2f}",
                "–" if ratio is None else f"{ratio:.2f}",
            )
        )
    return table(rows, right=range(1, len(rows[0])))


def _rates(run: Run) -> str:
    if run.rates is None:
        return _wrapped("", f"the rates of this machine are unknown: {run.rates_problem}")
    gemm, conv = (
        {precision: f"{rate / 1e9:.0f}" for precision, rate in rates.items()}
        for rates in (run.rates.gemm, run.rates.conv)
    )
    copies = f"{run.rates.bandwidth / 1e9:.1f}"
    return _wrapped(
        "",
        f"this machine, measured in the same rounds on {_count(run.rates.threads, 'thread')}: "
        f"products {gemm['fp32']} GFLOP/s in fp32, {gemm['int8']} GOP/s in int8; 3 × 3 "
        f"convolutions {conv['fp32']} and {conv['int8']}; copies {copies} GB/s, read and written",
    )


def _launches(run: Run) -> str:
    """A column of times for everyone who can tell them, one of floors for our own."""
    told = [result for result in run.results if result.ran and result.launches]
    if not told:
        return ""
    head = ["median ms"]
    for result in told:
        head.append(result.name.removeprefix("var-deploy "))
        head += ["floor", "reached"] if result.rooflines else []
    columns = [(result, result.launches, {f.name: f for f in result.rooflines}) for result in told]
    rows = [tuple(head)]
    for name in told[0].launches:
        row = [name]
        for _, launches, least in columns:
            seconds = launches[name].median if name in launches else None
            row.append("–" if seconds is None else f"{1e3 * seconds:.2f}")
            if least:
                floor = least[name].seconds
                row += [f"{1e3 * floor:.2f}", _percent(floor / seconds if seconds else None)]
        rows.append(tuple(row))
    last = ["all, with the host"]
    for result, _, least in columns:
        last.append(f"{1e3 * result.whole.median:.2f}")
        if least:
            total = sum(floor.seconds for floor in least.values())
            last += [f"{1e3 * total:.2f}", _percent(result.reached)]
    floors = [n for n, name in enumerate(head) if name in ("floor", "reached")]
    others = [n for n in range(len(head) - 1, 1, -1) if n not in floors]
    return table([*rows, tuple(last)], right=range(1, len(head)), optional=[*floors, *others])


def _notes(run: Run) -> str:
    """What ran, and why something is missing."""
    lines = []
    for result in run.results:
        about = result.about.settings if result.about else {}  # not the reason, which can be long
        said = result.problem or ", ".join(f"{k} {v}" for k, v in about.items())
        lines.append(f"{result.name}: {'not run: ' if result.problem else ''}{said}")
        if result.ran:
            lines += [f"{result.name}: no floor: {why}" for why in [result.roofline_problem] if why]
    ran = [result for result in run.results if result.ran]
    for what, reasons in (
        ("memory is unknown", [r.peak_problem for r in ran if r.peak is None]),
        ("joules", [r.energy.problem for r in ran]),
    ):
        lines += [f"{what}: {reason}" for reason in dict.fromkeys(filter(None, reasons))]
    return "\n".join(_wrapped("", line) for line in lines)


def _wrapped(head: str, text: str) -> str:
    return wrapped(text, head, " " * (len(head) or 2))


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
