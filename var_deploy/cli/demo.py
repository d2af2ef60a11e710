"""`var-deploy demo`: the bundles that come with var-deploy and first pictures, without PyTorch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from var_deploy import names
from var_deploy.cli.console import echo, human_bytes, say
from var_deploy.cli.generate import generate
from var_deploy.cli.options import out_option, report_options
from var_deploy.demo import (
    POCKET,
    POCKET_TEXT,
    POCKET_TEXT_ENCODER,
    PackedBundle,
    write_demo_bundle,
)
from var_deploy.errors import UsageError
from var_deploy.host.installation import PROGRAM, activation, pip_install, program
from var_deploy.manifest import Manifest
from var_deploy.text.examples import examples
from var_deploy.text.manifest import TextEncoderManifest

EACH = 4  # pictures of a class, or of a sentence
ALONE = 8  # of the only sentence
SEED = 1
ADDRESS = "http://127.0.0.1:8000"  # of `serve`, unless it is told otherwise
PICTURE, TEXT_PICTURE = "demo.png", "demo-text.png"


@click.command()
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Draws this sentence, or several, instead of the examples, and leaves the classes out.",
)
@out_option(
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build"),
    show_default=True,
    metavar="FOLDER",
    help=f"Gets the bundles FOLDER/{POCKET.name} and FOLDER/{POCKET_TEXT.name}, and the pictures "
    f"{PICTURE} and {TEXT_PICTURE}.",
)
@report_options
def demo(prompts: tuple[str, ...], out: Path, quiet: bool, as_json: bool) -> None:
    """Write the bundles of the two models that come with var-deploy, and first pictures.

    pocket makes pictures of classes, pocket-text of sentences. Needs the extras cpu and, for
    sentences, text; neither PyTorch nor a network. The bundles are those of `export pocket` and of
    `export pocket-text`, byte by byte; one that is there already is used as it is. The last lines
    say what can be done with them.

    \b
    Example:
      var-deploy demo
      var-deploy demo --prompt "a purple fish under a full moon"
      var-deploy serve build/pocket-text
    """
    silent = quiet or as_json
    missing = _missing_of_text()
    if prompts and missing:
        raise UsageError(f"sentences need the library tokenizers; run {missing}")
    told: dict[str, Any] = {}
    if not prompts:
        manifest = _bundle(POCKET, out, silent=silent)
        assert isinstance(manifest, Manifest)  # not a text encoder's
        count = EACH * len(manifest.labels)
        picture = out / PICTURE
        _generate(out / POCKET.name, ["--count", str(count)], picture, silent=silent)
        told |= {"bundle": str(out / POCKET.name), "digest": manifest.digest()}
        told["picture"] = str(picture)
    if not missing:
        # first, so that a bundle that is there has one
        _bundle(POCKET_TEXT_ENCODER, out, silent=silent)
        manifest = _bundle(POCKET_TEXT, out, silent=silent)
        sentences = prompts or examples(POCKET_TEXT.name)
        options = [word for text in sentences for word in ("--prompt", text)]
        count = ALONE if len(sentences) == 1 else EACH * len(sentences)
        picture = out / TEXT_PICTURE
        _generate(
            out / POCKET_TEXT.name, [*options, "--count", str(count)], picture, silent=silent
        )
        told["text"] = {
            **{"bundle": str(out / POCKET_TEXT.name), "digest": manifest.digest()},
            **{"picture": str(picture), "prompts": list(sentences)},
        }
    elif not silent:
        say(f"no pictures of sentences: they need tokenizers; run {missing}", err=True)
    following = _following(out, text=not missing, classes=not prompts)
    if as_json:
        echo(json.dumps({"text": None, **told, "next": following}, indent=1))
    elif not quiet:
        say("next:")
        for line in following:
            say(f"  {line}")


def _missing_of_text() -> str:
    """How to install what sentences need, "" where it is there."""
    if importlib.util.find_spec("tokenizers") is None:
        return pip_install("text", "tokenizers")
    return ""


def _generate(bundle: Path, options: Sequence[str], picture: Path, *, silent: bool) -> None:
    """Make one picture, a grid, as `generate` does."""
    # so small a model gains little from more, and threads that wait for a busy core lose much
    words = [str(bundle), *options, "--seed", str(SEED), "--threads", "1", "--out", str(picture)]
    words += ["--quiet"] if silent else []
    context = generate.make_context("demo", words, parent=click.get_current_context().find_root())
    with context:
        generate.invoke(context)


def _bundle(
    packed: PackedBundle, out: Path, *, silent: bool
) -> Manifest | TextEncoderManifest:
    """The manifest of a bundle in the folder `out`, which is written where none is there."""
    path = out / packed.name
    if (path / names.MANIFEST).exists():
        manifest = packed.manifest(path)
        if isinstance(manifest, Manifest) and manifest.preset != packed.name:
            raise UsageError(
                f"{path} is a bundle of another model than {packed.name}: choose --out"
            )
        return manifest
    manifest = write_demo_bundle(packed, path)
    if not silent:
        size = sum(file.size for file in manifest.files.values())
        say(f"wrote {path} ({len(manifest.files)} files, {human_bytes(size)})")
    return manifest


def _following(out: Path, *, text: bool, classes: bool) -> list[str]:
    """Commands that go on from here, as a shell in this folder takes them, one after the other."""
    lines, call = [], program()
    if command := activation():
        call = PROGRAM
        lines.append(f"{command}   # so that the shell finds {PROGRAM}")
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        lines.append(f"{pip_install('serve')}   # what serve needs besides")
    shown = out / (POCKET.name if classes else POCKET_TEXT.name)
    lines.append(f"{call} serve {shown}   # a page and an API on {ADDRESS}")
    if classes:
        made = f"generate {out / POCKET.name} --labels house,fish --count 8 --seed 5 --out more.png"
        lines.append(f"{call} {made}")
    if text:
        made = f'generate {out / POCKET_TEXT.name} --prompt "a red boat on the sea" --out boat.png'
        lines.append(f"{call} {made}")
    return lines
