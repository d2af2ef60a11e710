"""`var-deploy serve`: runs the HTTP service."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from var_deploy.cli.console import ProgressBar, needs_extra, say
from var_deploy.cli.options import load_options, load_pipeline, quiet_option
from var_deploy.cli.prompts import keep_text_encoder_option, text_encoder_option
from var_deploy.cluster.replicas import Replicas
from var_deploy.config import RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.text.prompt_tokenizer import MAX_CHARACTERS

if TYPE_CHECKING:
    from var_deploy.serving.settings import Settings

LEVELS = ("critical", "error", "warning", "info", "debug")
FORMATS = ("text", "json")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 lets other machines in, :: those with IPv6 as well. There "
    "is no authentication.",
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
    help="Bytes of a request with a picture; others may have 65536.",
)
@click.option(
    "--max-prompt",
    type=click.IntRange(1, MAX_CHARACTERS),
    default=4000,
    show_default=True,
    help="Characters of a prompt, for a bundle that takes prompts.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 1 << 16),
    show_default="512",
    help="That are open at a time; the next one gets 503.",
)
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="A name by which the service is called, as in images.example.org; *.example.org for all "
    "names below it, * for every name. May be given several times; IP addresses, localhost and the "
    "name of --host are always answered.",
)
@click.option(
    "--root-path",
    default="",
    metavar="PATH",
    help="Where a proxy has put the service, as in /images; it may take the path away or leave it.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    show_default="info; with --quiet warning",
    help="What is logged on stderr; info has one line per request.",
)
@click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    show_default="text",
    help="Of the log: text, or a JSON object per line.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Serve from a Ray cluster: local (of this machine alone), auto, HOST:PORT of a cluster's "
    "node, or ray://HOST:PORT.",
)
@click.option(
    "--replicas",
    metavar="N|MIN:MAX",
    show_default="1",
    help="With --ray: pipelines that generate; MIN:MAX lets their number follow the load.",
)
@text_encoder_option()
@keep_text_encoder_option
@load_options
@click.option("--verbose", "-v", is_flag=True, help="As --log-level debug.")
@quiet_option(
    help="Do not say where the service is, and log no requests."
)
def serve(
    bundle: Path,
    host: str,
    port: int,
    queue: int,
    max_count: int,
    max_pixels: int,
    max_body: int,
    max_prompt: int,
    max_connections: int | None,
    allowed_host: tuple[str, ...],
    root_path: str,
    log_level: str | None,
    log_format: str | None,
    address: str | None,
    replicas: str | None,
    text_encoder: Path | None,
    keep_text_encoder: bool,
    config: RuntimeConfig,
    verbose: bool,
    quiet: bool,
) -> None:
    """Serve BUNDLE over HTTP, with a page to generate and edit images in the browser.

    /docs describes the routes, /metrics is for Prometheus. Ctrl-C or SIGTERM finishes what was
    taken and refuses the rest; a second one drops it. A request that names the service otherwise
    than by an IP address, localhost or --allowed-host is refused: a web page of a stranger could
    have sent it (DNS rebinding). With --ray each replica takes a GPU, or as many CPUs as --threads
    says, one without it, and Ray keeps the log.

    \b
    Example:
      var-deploy serve build/pocket
      var-deploy serve build/d16 --port 8080 --queue 16 --threads 4
      var-deploy serve build/d16 --host 0.0.0.0 --allowed-host images.example.org
      var-deploy serve build/d16 --ray auto --replicas 1:8
      curl http://127.0.0.1:8000/v1/images -H 'Content-Type: application/json' \\
           -H 'Accept: image/png' -d '{"labels": ["star"], "seed": 7}' -o star.png
      curl http://127.0.0.1:8000/v1/images -H 'Content-Type: application/json' \\
           -H 'Accept: image/png' -d '{"prompt": "a red fox"}' -o fox.png
    """
    with needs_extra("serve", "serve"):
        from var_deploy.serving.app import create_app
        from var_deploy.serving.hosts import own_names
        from var_deploy.serving.log import logging_to_stderr
        from var_deploy.serving.server import Server, address_of, listen
        from var_deploy.serving.settings import Settings

    # everything that can be wrong is looked at before the weights are loaded
    settings = Settings(
        queue=queue,
        count=max_count,
        pixels=max_pixels,
        body=max_body,
        prompt=max_prompt,
        connections=max_connections or Settings.connections,
        hosts=(*allowed_host, *own_names(host)),
        root_path=root_path.rstrip("/"),
    )
    manifest = read_manifest(bundle)
    if keep_text_encoder:
        if not manifest.takes_text:
            raise UsageError("--keep-text-encoder is for a bundle that takes prompts")
        config = dataclasses.replace(config, keep_text_encoder=True)
    if address is not None:
        for name, value in (
            ("--max-connections", max_connections),
            ("--log-level", log_level),
            ("--verbose", verbose or None),
            ("--log-format", log_format),
        ):
            if value is not None:
                raise UsageError(f"{name} is of one process: with --ray, Ray's proxies see to it")
        many = Replicas.parse("1" if replicas is None else replicas)
        _serve_on_ray(
            bundle, manifest, address, many, host, port, settings, config, text_encoder, quiet
        )
        return
    if replicas is not None:
        raise UsageError("--replicas needs --ray: without it one process draws")
    with listen(host, port) as listening:
        with ProgressBar(quiet=quiet) as progress:
            progress.update("loading", 0.0)
            pipe = load_pipeline(bundle, manifest, config, text_encoder)
        with pipe:
            server = Server(create_app(pipe, settings, name=bundle.resolve().name))
            if not quiet:
                say(f"serving {bundle} on {address_of(listening)} (Ctrl-C stops)")
            level = log_level or ("debug" if verbose else "warning" if quiet else "info")
            with logging_to_stderr(level, log_format or "text"):
                server.run([listening])


def _serve_on_ray(
    bundle: Path,
    manifest: Manifest,
    address: str,
    replicas: Replicas,
    host: str,
    port: int,
    settings: Settings,
    config: RuntimeConfig,
    text_encoder: Path | None,
    quiet: bool,
) -> None:
    with needs_extra("ray", "serve --ray"):
        from var_deploy.cluster.connect import LOCAL, connected
        from var_deploy.serving.server import listen, url_of

    if address == LOCAL:
        with listen(host, port) as free:  # Ray would say it in the log of a process of its own
            port = free.getsockname()[1]
    elif port == 0:
        raise UsageError("--port 0 needs --ray local: nodes of a cluster listen on the same port")
    with ProgressBar(quiet=quiet) as progress, connected(address):
        with needs_extra("ray", "serve --ray"):
            from var_deploy.cluster.service import deployed, plan_for, until_stopped

        progress.update("starting replicas", 0.0)
        plan = plan_for(bundle, manifest, replicas, settings, config, text_encoder)
        with deployed(plan, host, port, alone=address == LOCAL) as handle:
            if not quiet:
                say(f"serving {bundle} on {url_of(host, port)} (Ctrl-C stops)")
            until_stopped(handle)
