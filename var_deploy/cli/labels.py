"""`var-deploy labels`: the classes of a bundle, and a search among them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from var_deploy.cli.console import echo, echo_json, say, table
from var_deploy.errors import LabelError
from var_deploy.labels import close_names, search_classes
from var_deploy.labels.synonyms import all_classes
from var_deploy.manifest import read_manifest

SYNONYMS_WIDTH = 40  # characters; --json has all of them


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.argument("word", required=False)
@click.option("--json", "as_json", is_flag=True, help="As a list of objects.")
def labels(bundle: Path, word: str | None, as_json: bool) -> None:
    """List the classes of BUNDLE, or those that WORD may mean: a name, a part of one, a number.

    ImageNet's classes are found by their other names as well. --labels and --label take the number
    or the name of a class.

    \b
    Example:
      var-deploy labels build/pocket
      var-deploy labels build/d16 husky
    """
    manifest = read_manifest(bundle)
    transformer = manifest.model.transformer
    if not transformer.conditional:
        raise LabelError("this model has no classes: leave the labels out")
    found = all_classes(manifest.labels, transformer.classes)
    if word is not None:
        found = search_classes(word, found)
        if not found:
            close = close_names(word, manifest.labels)
            hint = f"did you mean {' or '.join(close)}?" if close else "run it without WORD"
            raise LabelError(f"no class is called {word!r}; {hint}")
    if as_json:
        echo_json([dataclasses.asdict(each) for each in found])
    elif not manifest.labels and word is None:
        say(f"the classes have no names: labels are the numbers 0 to {transformer.classes - 1}")
    else:
        rows = [
            (str(each.number), each.name, _shortened(", ".join(each.synonyms))) for each in found
        ]
        if any(row[2] for row in rows):
            echo(table([("label", "name", "also"), *rows], right=(0,)))
        else:
            echo(table([("label", "name"), *(row[:2] for row in rows)], right=(0,)))


def _shortened(text: str) -> str:
    if len(text) <= SYNONYMS_WIDTH:
        return text
    return text[: SYNONYMS_WIDTH - 1].rstrip(", ") + "…"
