"""`var-deploy build`: TensorRT engines of a bundle, for the device this runs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from var_deploy.cli.console import ProgressBar, echo, fitted, human_bytes, needs_extra, table
from var_deploy.cli.options import ComputeCapability, report_options, verbose_option
from var_deploy.config import AUTO, TENSORRT, TENSORRT_RTX, LayoutSet

if TYPE_CHECKING:
    from var_deploy.runtime.tensorrt.build import BuildReport


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32", "int8"]),
    show_default="fp16 where the bundle has it",
    help="Of the graphs to build; int8 is refused, it is for CPUs.",
)
@click.option(
    "--layout",
    type=click.Choice([AUTO, "shared", "per-scale", "both"]),
    default=AUTO,
    show_default=True,
    help="One engine for all scales, which holds the weights once, or one per scale.",
)
@click.option(
    "--workspace",
    type=click.IntRange(1, 1 << 20),
    metavar="MB",
    show_default="all of the device",
    help="Most memory a layer may use for itself.",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="0 builds quickest, 5 searches longest.",
)
@click.option("--low-memory", is_flag=True, help="Build each engine in a process of its own.")
@click.option(
    "--library",
    type=click.Choice([TENSORRT, TENSORRT_RTX]),
    show_default="the one that is installed",
    help="Which TensorRT.",
)
@click.option(
    "--compute-capability",
    type=ComputeCapability(),
    metavar="N.N",
    help="tensorrt_rtx only: build ahead of time for this one, as in 8.6 or 86; no GPU is needed.",
)
@click.option("--no-encoder", is_flag=True, help="Leave out what reads images and tokens.")
@click.option("--force", is_flag=True, help="Build again what is finished.")
@verbose_option()
@report_options
def build(
    bundle: Path,
    precision: str | None,
    layout: LayoutSet | Literal["auto"],
    workspace: int | None,
    optimization_level: int,
    low_memory: bool,
    library: str | None,
    compute_capability: int | None,
    no_encoder: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build the TensorRT engines of BUNDLE, on the device that runs them.

    They go into BUNDLE/engines, a folder for each device, version and precision. Finished engines
    are kept: after Ctrl-C or a failure the same command goes on where it was, and after a new
    export it builds what has changed.

    \b
    Example:
      var-deploy build build/d16
      var-deploy build build/d16 --low-memory --workspace 512
      var-deploy build build/d16 --library tensorrt_rtx --compute-capability 8.6
    """
    with needs_extra("tensorrt", "build"):
        from var_deploy.runtime.tensorrt.build import build_bundle
        from var_deploy.runtime.tensorrt.target import BuildOptions

        options = BuildOptions(
            workspace_mb=workspace,
            optimization_level=optimization_level,
            compute_capability=compute_capability,
        )
        with ProgressBar(quiet=quiet) as progress:
            report = build_bundle(
                bundle,
                precision=precision,
                layout=layout,
                options=options,
                low_memory=low_memory,
                library=library,
                encoder=not no_encoder,
                force=force,
                progress=progress.update,
            )
    if as_json or not quiet:
        echo(json.dumps(report.to_json(), indent=1) if as_json else _as_text(report))


def _as_text(report: BuildReport) -> str:
    rows = [("engine", "", "profiles", "size", "build time")]
    for engine in report.engines:
        state = "kept" if engine.kept else "built"
        size, seconds = human_bytes(engine.size), f"{engine.seconds:.1f} s"
        rows.append((engine.graph, state, str(engine.profiles), size, seconds))
    kept = sum(engine.kept for engine in report.engines)
    size = human_bytes(sum(engine.size for engine in report.engines))
    lines = [
        table(rows, right=(2, 3, 4), optional=(2, 4)),
        "",
        f"{report.folder}: {len(report.engines) - kept} built, {kept} kept, {size}",
        fitted(f"for {report.target.describe()}; layout {report.layout} ({report.reason})"),
        *(fitted(f"note: {note}") for note in report.notes),
    ]
    return "\n".join(lines)
