"""`var-deploy demo`: pocket's bundle and a first picture, without PyTorch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import click

from var_deploy import names
from var_deploy.cli.console import echo, human_bytes, say
from var_deploy.cli.generate import generate
from var_deploy.cli.options import out_option, report_options
from var_deploy.demo import PRESET, write_demo_bundle
from var_deploy.errors import UsageError
from var_deploy.host.installation import PROGRAM, activation, pip_install, program
from var_deploy.manifest import Manifest, read_manifest

IMAGES_PER_CLASS = 4
SEED = 1
ADDRESS = "http://127.0.0.1:8000"  # of `serve`, unless it is told otherwise


@click.command()
@out_option(
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build"),
    show_default=True,
    metavar="FOLDER",
    help="Gets the bundle as FOLDER/pocket and the picture as FOLDER/demo.png.",
)
@report_options
def demo(out: Path, quiet: bool, as_json: bool) -> None:
    """Write the bundle of pocket, the model that comes with var-deploy, and a first picture.

    Needs the extra cpu, and neither PyTorch nor a network. The bundle is that of `export pocket`,
    byte by byte; one that is there already is used as it is. The last lines say what can be done
    with it.

    \b
    Example:
      var-deploy demo
      var-deploy serve build/pocket
    """
    bundle, picture = out / PRESET, out / "demo.png"
    manifest = _bundle(bundle, say_so=not quiet and not as_json)
    options = ["--count", str(IMAGES_PER_CLASS * len(manifest.labels)), "--seed", str(SEED)]
    # so small a model gains little from more, and threads that wait for a busy core lose much
    options += ["--threads", "1"]
    options += ["--quiet"] if quiet or as_json else []
    words = [str(bundle), *options, "--out", str(picture)]
    context = generate.make_context("demo", words, parent=click.get_current_context().find_root())
    with context:
        generate.invoke(context)
    following = _following(bundle)
    if as_json:
        done = {"bundle": str(bundle), "digest": manifest.digest(), "picture": str(picture)}
        echo(json.dumps({**done, "next": following}, indent=1))
    elif not quiet:
        say("next:")
        for line in following:
            say(f"  {line}")


def _bundle(path: Path, *, say_so: bool) -> Manifest:
    """The bundle at `path`, written where none is there."""
    if (path / names.MANIFEST).exists():
        manifest = read_manifest(path)
        if manifest.preset != PRESET:
            raise UsageError(f"{path} is a bundle of another model than {PRESET}: choose --out")
        return manifest
    manifest = write_demo_bundle(path)
    if say_so:
        size = sum(file.size for file in manifest.files.values())
        say(f"wrote {path} ({len(manifest.files)} files, {human_bytes(size)})")
    return manifest


def _following(bundle: Path) -> list[str]:
    """Commands that go on from here, as a shell in this folder takes them, one after the other."""
    lines, call = [], program()
    if command := activation():
        call = PROGRAM
        lines.append(f"{command}   # so that the shell finds {PROGRAM}")
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        lines.append(f"{pip_install('serve')}   # what serve needs besides")
    lines.append(f"{call} serve {bundle}   # a page and an API on {ADDRESS}")
    made = f"generate {bundle} --labels house,fish --count 8 --seed 5 --out more.png"
    return [*lines, f"{call} {made}"]
