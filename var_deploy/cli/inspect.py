"""`var-deploy inspect`: what a bundle holds, and whether it is intact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from var_deploy.cli.console import human_bytes, table
from var_deploy.errors import BundleError
from var_deploy.manifest import Manifest, check_files, read_manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="The same as JSON on stdout.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Show the model, graphs and labels of BUNDLE, and check every file against its hash.

    Ends with 1 where a file is missing or damaged. Nothing is loaded or run.

    \b
    Example:
      var-deploy inspect build/pocket
    """
    manifest = read_manifest(bundle)
    damage = _damage(bundle, manifest)
    if as_json:
        click.echo(json.dumps(_as_json(manifest, damage), indent=1, ensure_ascii=False))
    else:
        click.echo(_as_text(bundle, manifest, damage))
    if damage:
        rest = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise BundleError(damage[0] + rest)


def _damage(bundle: Path, manifest: Manifest) -> list[str]:
    """One message for every file that is not what the manifest says."""
    messages: dict[str, None] = {}  # in order, without repeats: a prefix may match two names
    for name in manifest.files:
        try:
            check_files(bundle, manifest, prefix=name)
        except BundleError as error:
            messages[str(error)] = None
    return list(messages)


def _as_json(manifest: Manifest, damage: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(manifest.to_json())
    return {**data, "digest": manifest.digest(), "intact": not damage, "damage": damage}


def _as_text(bundle: Path, manifest: Manifest, damage: list[str]) -> str:
    spec = manifest.model
    transformer, tokenizer = spec.transformer, spec.tokenizer
    sides = " ".join(map(str, spec.patch_nums))
    labels = f"{transformer.classes} classes" if transformer.conditional else "unconditional"
    if manifest.labels:
        shown = ", ".join(manifest.labels[:16])
        labels += f": {shown}" + (", …" if len(manifest.labels) > 16 else "")
    facts = [
        ("bundle", f"{bundle} (digest {manifest.digest()[:16]})"),
        ("model", manifest.preset or "no preset"),
        ("image", f"{tokenizer.image_side} × {tokenizer.image_side} pixels"),
        (
            "transformer",
            f"{transformer.family}, {transformer.depth} blocks, width {transformer.width}, "
            f"{transformer.heads} heads",
        ),
        ("tokenizer", f"{tokenizer.vocab_size} codes of width {tokenizer.code_width}"),
        ("scales", f"{spec.scales}: {sides} ({spec.total_tokens} tokens)"),
        ("labels", labels),
        ("batch", f"{manifest.batch}, guidance {'on' if manifest.guidance else 'off'}"),
        ("defaults", str(manifest.defaults)),
        ("precisions", ", ".join(manifest.graphs)),
        ("size", human_bytes(sum(file.size for file in manifest.files.values()))),
        ("files", "all intact" if not damage else f"{len(damage)} of {len(manifest.files)} not"),
        ("parity", _parity(manifest.parity)),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    rows = [("graph", "file", "size", "weights used")]
    for by_name in manifest.graphs.values():
        for name, graph in by_name.items():
            file = manifest.files.get(graph.file)
            size = human_bytes(file.size) if file else "not listed"
            rows.append((name, graph.file, size, human_bytes(graph.weight_bytes)))
    return "\n".join([*lines, "", table(rows, right=(2, 3)), *(["", *damage] if damage else [])])


def _parity(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "not verified yet; run var-deploy verify"
    if report.get("passed"):
        return "verified: agrees with the PyTorch model"
    return f"verify failed: {report.get('failure') or 'a tolerance did not hold'}"
