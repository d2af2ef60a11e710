"""`var-deploy inspect`: what a bundle holds, and whether it is intact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from var_deploy.cli import tensors
from var_deploy.cli.console import (
    echo,
    echo_json,
    facts,
    human_bytes,
    needs_extra,
    paint,
    table,
)
from var_deploy.cli.engines import Engines, read_all
from var_deploy.cli.options import (
    CheckpointOptions,
    checkpoint_options,
    quiet_option,
    verbose_option,
)
from var_deploy.errors import BundleError, UsageError
from var_deploy.manifest import Manifest, check_files, read_manifest
from var_deploy.names import MANIFEST
from var_deploy.spec import ModelSpec, TextModelSpec

AGREES = "verified"
FILES = {
    "transformer": "checkpoint",
    "tokenizer": "tokenizer file",
    "text encoder": "text encoder",
}
MAX_ORIGIN = 300  # characters: they may come from a stranger

@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@checkpoint_options
@click.option("--graph", metavar="NAME", help="Instead, the tensors of this graph.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    show_default="the first that has it",
    help="With --graph: of which graph.",
)
@quiet_option(help="Check alone: the exit code tells.")
@verbose_option()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON on stdout.")
def inspect(
    bundle: Path | None,
    weights: CheckpointOptions,
    graph: str | None,
    precision: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show what BUNDLE holds, and whether every file is intact.

    Model, labels, checkpoint, graphs, engines and the last report of verify; or, with --graph, the
    tensors that one graph takes and gives, and what each is for. Ends with 1 where a file is
    missing or damaged. Nothing is loaded or run.

    With a checkpoint file in place of BUNDLE, a folder of its shards, the Hugging Face folder of a
    T5, or with --checkpoint and --tokenizer: name, hash and sizes of what export would read; of a
    text-to-image model the preset that has these sizes.

    \b
    Example:
      var-deploy inspect build/pocket
      var-deploy inspect var_d16.pth --tokenizer vae_ch160v4096z32.pth
      var-deploy inspect build/pocket --graph scale_03
      var-deploy inspect build/pocket --quiet && echo intact
    """
    if precision is not None and graph is None:
        raise UsageError("--precision goes with --graph")
    if bundle is None or bundle.is_file() or weights.given or _holds_weights(bundle):
        _inspect_checkpoints(bundle, weights, graph, quiet, as_json)
        return
    manifest = read_manifest(bundle)
    if graph is not None:
        data, text, damage = _of_graph(bundle, manifest, graph, precision)
    else:
        data, text, damage = _of_bundle(bundle, manifest)
    if as_json:
        data |= {"intact": not damage, "damage": damage}
        echo_json(data)
    elif not quiet:
        echo("\n".join([text, *(["", *damage] if damage else [])]))
    if damage:
        rest = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise BundleError(damage[0] + rest)


def _inspect_checkpoints(
    file: Path | None, weights: CheckpointOptions, graph: str | None, quiet: bool, as_json: bool
) -> None:
    if file is None and weights.checkpoint is None and weights.tokenizer is None:
        raise UsageError("give a bundle, a checkpoint file, or --checkpoint and --tokenizer")
    if file is not None and not file.is_file() and not _holds_weights(file):
        raise UsageError(
            f"{file} is not a file: --checkpoint, --tokenizer and what tells of them go with "
            "checkpoint files, not with a bundle"
        )
    if graph is not None:
        raise UsageError("--graph goes with a bundle: a checkpoint has no graphs")
    with needs_extra("export", "inspect"):
        from var_deploy.export.checkpoint.facts import describe_checkpoints

        found = describe_checkpoints(
            file,
            checkpoint=weights.checkpoint,
            tokenizer=weights.tokenizer,
            hints=weights.hints(),
        )
    if as_json:
        echo_json(found.to_json())
        return
    rows: list[tuple[str, str]] = []
    for part in found.parts:
        place = f" at {part.key}" if part.key else ""
        rows += [
            (FILES[part.part], f"{part.file}{place}, {human_bytes(part.size)}"),
            ("", f"sha256 {part.sha256}"),
            ("", f"{part.tensors} tensors of {part.parameters / 1e6:.2f} million values"),
        ]
    if found.sizes:
        rows += _text_sizes(found.sizes, found.presets)
    elif found.spec is not None:
        rows += _sizes(found.spec)
    elif len(found.parts) == 1:
        lacking = {"transformer": "--tokenizer", "tokenizer": "--checkpoint"}[found.parts[0].part]
        rows.append(("sizes", f"need the other file as well: {lacking}"))
    if not quiet:
        echo(facts(rows))


def _holds_weights(path: Path) -> bool:
    """Whether a folder is no bundle but holds a checkpoint: shards, or a Hugging Face model."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return False
    patterns = ("config.json", "*.index.json", "*.safetensors", "*.bin")
    return any(next(path.glob(pattern), None) for pattern in patterns)


def _text_sizes(
    sizes: Mapping[str, Mapping[str, Any]], presets: Sequence[str]
) -> list[tuple[str, str]]:
    """Rows for the parts of a text-to-image model, or for a text encoder."""
    rows = [("preset", " or ".join(presets) or "none has these sizes")]
    if t := sizes.get("transformer"):
        told = f"infinity, {t['depth']} blocks, width {t['width']}, {t['heads']} heads"
        rows.append(("transformer", f"{told}, {t['token_bits']} bits a token"))
        longest = f"up to {t['unconditional_length']} tokens"
        rows.append(("prompts", f"features of width {t['text_width']}, {longest}"))
    if t := sizes.get("tokenizer"):
        widths = " ".join(str(t["base_width"] * n) for n in t["width_multipliers"])
        rows.append(("tokenizer", f"{t['bits']} bits a position, {widths} channels"))
    if t := sizes.get("text encoder"):
        told = f"T5, {t['depth']} blocks, width {t['width']}, {t['heads']} heads of "
        rows.append(("text encoder", f"{told}{t['head_width']}, {t['vocab_size']} tokens"))
    else:
        rows.append(("scales", "are chosen at export: --resolution and --aspect"))
    return rows


def _of_graph(
    bundle: Path, manifest: Manifest, name: str, precision: str | None
) -> tuple[dict[str, Any], str, list[str]]:
    """JSON, text and damage of one graph; its weights are not looked at."""
    precision = tensors.find_graph(manifest, name, precision)
    damage = _damage(bundle, manifest, [manifest.graphs[precision][name].file])
    data = tensors.as_json(manifest, precision, name)
    return data, tensors.as_text(manifest, precision, name), damage


def _of_bundle(bundle: Path, manifest: Manifest) -> tuple[dict[str, Any], str, list[str]]:
    """JSON, text and damage of everything."""
    files = _damage(bundle, manifest, list(manifest.files))
    engines = read_all(bundle, manifest)
    damage = [*files, *(problem for folder in engines for problem in folder.damage)]
    data: dict[str, Any] = json.loads(manifest.to_json())
    data |= {"digest": manifest.digest(), "parity_is_current": manifest.parity_is_current()}
    data |= {"engines": [folder.to_json() for folder in engines]}
    parts = [_facts(bundle, manifest, files, engines), _graphs(manifest)]
    parts += [folder.text() for folder in engines]
    if manifest.parity_is_current() is not False:
        parts.append(_parity_table(manifest.parity or {}))
    return data, "\n\n".join(part for part in parts if part), damage


def _damage(bundle: Path, manifest: Manifest, files: Sequence[str]) -> list[str]:
    """One message for every file that is not what the manifest says."""
    messages: dict[str, None] = {}  # in order, without repeats: a prefix may match two names
    for name in files:
        try:
            check_files(bundle, manifest, prefix=name)
        except BundleError as error:
            messages[str(error)] = None
    return list(messages)


def _facts(
    bundle: Path, manifest: Manifest, damage: Sequence[str], engines: Sequence[Engines]
) -> str:
    spec = manifest.model
    transformer = spec.transformer
    labels = f"{transformer.classes} classes" if transformer.conditional else "unconditional"
    if isinstance(spec, TextModelSpec):
        labels = f"prompts of up to {spec.transformer.text_length} tokens"
    if manifest.labels:
        shown = ", ".join(manifest.labels[:16])
        labels += f": {shown}" + (", …" if len(manifest.labels) > 16 else "")
    intact = paint("all intact", "green")
    if damage:
        intact = paint(f"{len(damage)} of {len(manifest.files)} not intact", "red")
    return facts(
        [
            ("bundle", f"{bundle} (digest {manifest.digest()[:16]})"),
            ("model", manifest.preset or "no preset"),
            *_sizes(spec),
            ("prompts" if manifest.takes_text else "labels", labels),
            *_origins(manifest),
            ("batch", _batch(manifest)),
            ("defaults", str(manifest.defaults)),
            *([("codes", "mixed, more smooth")] if manifest.more_smooth else []),
            *_text_encoder(manifest),
            ("precisions", ", ".join(manifest.graphs)),
            ("engines", ", ".join(folder.name for folder in engines) or "none built"),
            ("size", human_bytes(sum(file.size for file in manifest.files.values()))),
            ("files", intact),
            *_parity(manifest, intact=not damage),
        ]
    )


def _batch(manifest: Manifest) -> str:
    own = "".join(f" ({name}: {batch})" for name, batch in sorted(manifest.batches.items()))
    return f"{manifest.batch}{own}, guidance {'on' if manifest.guidance else 'off'}"


def _text_encoder(manifest: Manifest) -> list[tuple[str, str]]:
    ref = manifest.text_encoder
    return [] if ref is None else [("text", f"{ref.folder} (digest {ref.digest[:16]})")]


def _sizes(spec: ModelSpec | TextModelSpec) -> list[tuple[str, str]]:
    transformer, tokenizer = spec.transformer, spec.tokenizer
    if isinstance(spec, ModelSpec):
        sides = " ".join(map(str, spec.patch_nums))
        kind = f"{spec.tokenizer.vocab_size} codes of width {tokenizer.code_width}"
    else:
        sides = " ".join(f"{rows}×{columns}" for rows, columns in spec.grids)
        kind = f"{spec.tokenizer.token_bits} bits a token"
    height, width = tokenizer.image_size
    return [
        ("image", f"{width} × {height} pixels"),
        (
            "transformer",
            f"{transformer.family}, {transformer.depth} blocks, width {transformer.width}, "
            f"{transformer.heads} heads",
        ),
        ("tokenizer", kind),
        ("scales", f"{spec.scales}: {sides} ({spec.total_tokens} tokens)"),
    ]


def _origins(manifest: Manifest) -> list[tuple[str, str]]:
    """Where the weights came from, as the manifest tells it."""
    rows: list[tuple[str, str]] = []
    for part in ("transformer", "tokenizer"):
        source = manifest.checkpoint.get(part)
        told = source if isinstance(source, Mapping) else {}
        digest = f", sha256 {str(told['sha256'])[:16]}" if "sha256" in told else ""
        if told.get("random_weights") is not None:
            where = f"random weights, seed {told['random_weights']}"
        elif "module" in told:
            where = f"a {told['module']} in memory{digest} of its values"
        elif "file" in told:
            where = f"{told['file']}{' at ' + str(told['key']) if 'key' in told else ''}{digest}"
        else:
            continue
        rows.append(("checkpoint" if not rows else "", where[:MAX_ORIGIN]))
    return rows


def _graphs(manifest: Manifest) -> str:
    rows = [("graph", "file", "size", "weights used")]
    for by_name in manifest.graphs.values():
        for name, graph in by_name.items():
            size = human_bytes(manifest.files[graph.file].size)
            rows.append((name, graph.file, size, human_bytes(graph.weight_bytes)))
    return table(rows, right=(2, 3), optional=(3,))


def _parity(manifest: Manifest, *, intact: bool) -> list[tuple[str, str]]:
    """What the stored report of verify says of the files that are there now, in rows."""
    told = _parity_line(manifest, intact=intact)
    if told != AGREES:
        return [("parity", told)]
    report = manifest.parity or {}
    shown = [str(line) for line in report.get("verdict") or ["agrees with the PyTorch model"]]
    names = ["parity", *[""] * (len(shown) - 1)]
    return [(n, paint(f"verified: {line}", "green")) for n, line in zip(names, shown, strict=True)]


def _parity_line(manifest: Manifest, *, intact: bool) -> str:
    report, current = manifest.parity, manifest.parity_is_current()
    if report is None:
        return "not verified yet; run var-deploy verify"
    again = "run var-deploy verify again"
    if current is False:
        return paint(f"not verified: the stored report is of other files; {again}", "yellow")
    if not report.get("passed"):
        failed = f"verify failed: {report.get('failure') or 'a tolerance did not hold'}"
        return paint(failed, "red")
    if current is None:
        old = f"verified, but the report does not say of which files; {again}"
        return paint(old, "yellow")
    if not intact:
        return paint("verified before the files were damaged", "yellow")
    return AGREES


def _parity_table(report: Mapping[str, Any]) -> str:
    """A line a graph of the last report, whose remarks are for verify to tell."""
    checks = report.get("checks") or []
    if not checks:
        return ""
    rows = [("verified", "worst tensor", "rel error", "bound", "tokens", "")]
    for check in checks:
        rows.append(
            (
                f"{check['precision']}/{check['graph']}",
                check["tensor"],
                _number(check["relative"]) if check["tensor"] else "",
                "" if check["bound"] is None else f"{check['bound']:.0e}",
                check["tokens"],
                paint("ok", "green") if check["passed"] else paint("FAIL", "red"),
            )
        )
    return table(rows, right=(2, 3, 4), optional=(1, 3))


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.1e}"
