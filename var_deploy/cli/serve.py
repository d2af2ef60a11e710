"""`var-deploy serve`: images over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from var_deploy.cli.console import Progress, needs_extra
from var_deploy.cli.options import RuntimeOptions, runtime_options
from var_deploy.manifest import read_manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 lets other machines in, and nobody is asked who he is.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes any that is free.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests that may wait; the next one is told to come back later.",
)
@click.option(
    "--max-count",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Images a request may ask for.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=25_000_000,
    show_default=True,
    help="Of a picture that is sent.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=32_000_000,
    show_default=True,
    help="Bytes of a request.",
)
@runtime_options
@click.option("--quiet", is_flag=True, help="Do not say where the service is.")
def serve(
    bundle: Path,
    host: str,
    port: int,
    queue: int,
    max_count: int,
    max_pixels: int,
    max_body: int,
    runtime: RuntimeOptions,
    quiet: bool,
) -> None:
    """Serve BUNDLE over HTTP, with a page to draw and edit in the browser.

    /docs describes the routes, /metrics is for Prometheus. Ctrl-C or SIGTERM finishes what was
    taken and refuses the rest; a second one drops it.

    \b
    Example:
      var-deploy serve build/pocket
      var-deploy serve build/d16 --port 8080 --queue 16 --threads 4
      curl http://127.0.0.1:8000/v1/images -H 'Content-Type: application/json' \\
           -H 'Accept: image/png' -d '{"labels": ["star"], "seed": 7}' -o star.png
    """
    with needs_extra("serve", "serve"):
        from var_deploy.serving.app import create_app
        from var_deploy.serving.server import Server, address_of, listen
        from var_deploy.serving.settings import Settings

    # everything that can be wrong is looked at before the weights are loaded
    settings = Settings(queue=queue, count=max_count, pixels=max_pixels, body=max_body)
    read_manifest(bundle)
    with listen(host, port) as listening:
        with Progress(quiet=quiet) as progress:
            progress.update("loading", 0.0)
            pipe = runtime.load(bundle)
        with pipe:
            if not quiet:
                click.echo(f"serving {bundle} on {address_of(listening)} (Ctrl-C stops)")
            server = Server(create_app(pipe, settings, name=bundle.resolve().name))
            server.run([listening])
