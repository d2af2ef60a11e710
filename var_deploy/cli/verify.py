"""`var-deploy verify`: does the bundle compute what the PyTorch model computes?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from var_deploy.cli.console import ProgressBar, echo, fitted, needs_extra, say, table
from var_deploy.cli.options import (
    MOST_ROUNDS,
    CheckpointOptions,
    checkpoint_options,
    label_option,
    quiet_option,
    verbose_option,
)
from var_deploy.errors import UsageError, VerificationError
from var_deploy.sampling import MAX_SEED

OPTIONAL = (2, 5, 1, 6, 3)  # abs error, logits, worst tensor, top-1, rel error

@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@checkpoint_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    show_default="all",
    help="Only these graphs.",
)
@click.option(
    "--bisect",
    "backends",
    metavar="A,B",
    help="Instead, find the first layer at which two backends part: onnxruntime, pytorch, "
    "tensorrt or tensorrt_rtx, each with :fp32 or :fp16.",
)
@click.option(
    "--graph",
    metavar="NAME",
    help="With --bisect: this graph alone, such as decoder, step, or 'step @ 3'.",
)
@click.option(
    "--samples",
    type=click.IntRange(0, MOST_ROUNDS),
    default=500,
    show_default=True,
    metavar="N",
    help="With int8 and a model that has a classifier (pocket): images per set for the class "
    "accuracy; 0 skips it.",
)
@click.option(
    "--images",
    type=click.IntRange(1, MOST_ROUNDS),
    show_default="4",
    metavar="N",
    help="Images to generate and compare, rounded up to whole batches.",
)
@click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), show_default="0", help="Of these images."
)
@label_option(
    "--labels",
    "--label",
    how="give it once, with commas",
    metavar="LABELS",
    show_default="other classes",
    help="Their classes, by names or numbers, repeated as needed.",
)
@click.option(
    "--module",
    metavar="PACKAGE.FILE:FUNCTION",
    help="Compare with PyTorch modules of your own: a function that returns (transformer, "
    "tokenizer), whose own forward then gives the logits, tokens and images.",
)
@quiet_option(help="No progress and no table: the exit code tells.")
@verbose_option()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def verify(
    bundle: Path,
    weights: CheckpointOptions,
    precision: str | None,
    backends: str | None,
    graph: str | None,
    samples: int,
    images: int | None,
    seed: int | None,
    labels: str | None,
    module: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare BUNDLE with the PyTorch model, graph by graph, then whole images.

    Every graph, but for int8 ones, is also checked against what TensorRT 10.3 takes. The report
    is stored in the bundle's manifest, where it can be written. Ends with 1 where a tolerance does
    not hold.

    \b
    Example:
      var-deploy verify build/pocket
      var-deploy verify build/d16 --checkpoint var_d16.pth --tokenizer vae_ch160v4096z32.pth
      var-deploy verify build/mine --module models.mine:load
      var-deploy verify build/pocket --bisect onnxruntime:fp32,tensorrt:fp16 --graph decoder
    """
    if backends is not None:
        if precision is not None:
            raise UsageError("--bisect takes the precision behind each backend, not --precision")
        given = {"images": images, "seed": seed, "labels": labels, "module": module}
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"--{name} does not go with --bisect, which takes one image")
        _bisect(bundle, backends, weights, graph, quiet, as_json)
        return
    if graph is not None:
        raise UsageError("--graph goes with --bisect")
    with needs_extra("export", "verify"):
        from var_deploy.export.verify.bundle import verify_bundle

        asked: dict[str, Any] = {"images": images, "seed": seed, "labels": labels}
        if module is not None:
            from var_deploy.export.modules import call_module_function

            asked["modules"] = call_module_function(module)
        with ProgressBar(quiet=quiet) as progress:
            report = verify_bundle(
                bundle,
                checkpoint=weights.checkpoint,
                tokenizer=weights.tokenizer,
                hints=weights.hints(),
                precision=precision,
                samples=samples,
                progress=progress.update,
                **{name: value for name, value in asked.items() if value is not None},
            )
    if as_json or not quiet:
        rows = table(report.rows(), optional=OPTIONAL)
        text = "\n".join([rows, *map(fitted, report.remarks())])
        data = {**report.to_json(), "unstored": report.unstored}
        echo(json.dumps(data, indent=1) if as_json else text)
    if report.unstored and not as_json:
        say(f"warning: the report could not be stored: {report.unstored}", err=True)
    if not report.passed:
        raise VerificationError(report.failure or f"{bundle} does not compute what the model does")


def _bisect(
    bundle: Path,
    backends: str,
    weights: CheckpointOptions,
    graph: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    with needs_extra("export", "verify"):
        from var_deploy.export.debug.bisect import bisect_bundle

        with ProgressBar(quiet=quiet) as progress:
            result = bisect_bundle(
                bundle,
                backends,
                checkpoint=weights.checkpoint,
                tokenizer=weights.tokenizer,
                hints=weights.hints(),
                graph=graph,
                progress=progress.update,
            )
    if as_json or not quiet:
        echo(json.dumps(result.to_json(), indent=1) if as_json else result.text())
    if result.divergence:
        raise VerificationError(result.headline)
