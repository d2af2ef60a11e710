"""`var-deploy triton`: a model repository for NVIDIA Triton."""

from __future__ import annotations

import json
from pathlib import Path

import click

from var_deploy.cli.console import ProgressBar, echo, human_bytes, say
from var_deploy.cli.options import MOST_BATCH, out_option, report_options, runtime_options
from var_deploy.cli.outputs import OUTPUT
from var_deploy.cli.prompts import text_encoder_option
from var_deploy.config import RuntimeConfig
from var_deploy.manifest import read_manifest

MAX_DELAY = 60_000  # milliseconds


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@out_option(
    type=OUTPUT,
    required=True,
    metavar="FOLDER",
    help="The model repository: a new folder, or an empty one.",
)
@click.option("--name", show_default="the bundle's folder", help="What Triton calls the model.")
@click.option(
    "--instances",
    type=click.IntRange(1, MOST_BATCH),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that generate, each with weights of its own.",
)
@click.option(
    "--queue",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    show_default="any number",
    help="Requests that may wait; the next one is refused. See docs/TRITON.md for the price.",
)
@click.option(
    "--queue-delay",
    type=click.FloatRange(0, MAX_DELAY),
    default=0.0,
    show_default=True,
    metavar="MS",
    help="Milliseconds that a request waits for others to fill its batch.",
)
@text_encoder_option()
@runtime_options
@report_options
def triton(
    bundle: Path,
    out: Path,
    name: str | None,
    instances: int,
    queue: int | None,
    queue_delay: float,
    text_encoder: Path | None,
    config: RuntimeConfig,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a model repository from which NVIDIA Triton serves BUNDLE.

    The scale loop runs in Triton's Python backend, so the server's Python needs var-deploy and the
    engine library, and nothing else. Triton batches requests up to the bundle's batch. The version
    is made of the bundle's digest. docs/TRITON.md shows a server and its clients.

    \b
    Example:
      var-deploy triton build/pocket --out model_repository
      var-deploy triton build/d16 --out models --name var --instances 2 --queue-delay 20
    """
    from var_deploy.triton.config import Serving, handed_over
    from var_deploy.triton.repository import on_gpu, write_repository

    manifest = read_manifest(bundle)
    serving = Serving(
        name=bundle.resolve().name if name is None else name,
        instances=instances,
        queue=queue,
        queue_delay=round(1000 * queue_delay),
        on_gpu=on_gpu(bundle, manifest, config),
    )
    with ProgressBar(quiet=quiet) as progress:
        written = write_repository(
            bundle, manifest, out, serving, config, text_encoder, progress.update
        )
    if as_json:
        report = {
            "out": str(out),
            "name": serving.name,
            "version": written.version,
            "digest": manifest.digest(),
            "max_batch_size": manifest.batch,
            "instances": serving.instances,
            "kind": "gpu" if serving.on_gpu else "cpu",
            "bytes": written.size,
            "bytes_copied": written.copied,
            "runtime": handed_over(config),
        }
        echo(json.dumps(report, indent=1))
    elif not quiet:
        how = f"{human_bytes(written.copied)} copied" if written.copied else "linked"
        say(
            f"wrote {written.folder}: version {written.version}, up to {manifest.batch} a batch, "
            f"{human_bytes(written.size)} ({how})"
        )
