"""`verify`: compares the graphs of a bundle with the PyTorch model.

Every graph is checked against the rules for its precision, then run on the inputs that the PyTorch
model had at this point, so that an error cannot hide behind an earlier one; its outputs are
compared in the order names, shapes, values. Then the whole loop runs on its own from the same
uniforms. Where int8 is among the precisions, many images are generated and classified at the end.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from var_deploy import names
from var_deploy.errors import BundleError, LabelError, UsageError
from var_deploy.export.checkpoint.assemble import LoadedModel, assemble, load_model
from var_deploy.export.checkpoint.files import TOP, Part, open_checkpoint
from var_deploy.export.checkpoint.hints import NO_HINTS, Hints
from var_deploy.export.checkpoint.module_weights import ModuleWeights, weights_sha256
from var_deploy.export.checkpoint.presets import TEXT_PRESETS
from var_deploy.export.checkpoint.shard_index import stored_sha256
from var_deploy.export.checkpoint.text_model import LoadedTextModel, load_text_model
from var_deploy.export.verify.floats import FloatTolerance
from var_deploy.export.verify.graphs import GraphVerifier, Tolerance
from var_deploy.export.verify.held_modules import OwnForward, tokenizer_of
from var_deploy.export.verify.int8 import Int8Tolerance
from var_deploy.export.verify.reference import Inputs, generation_inputs
from var_deploy.export.verify.report import Check, VerifyReport, merged
from var_deploy.export.verify.requests import inputs_of, reference_of
from var_deploy.export.verify.samples import (
    SampleStudy,
    SkippedStudy,
    check_count,
    study_samples,
)
from var_deploy.files import locked_folder
from var_deploy.labels import resolve_labels
from var_deploy.manifest import Manifest, check_files, file_sha256, read_manifest
from var_deploy.progress import Progress
from var_deploy.scale_lists import list_of
from var_deploy.spec import TextModelSpec

# Largest difference over the largest magnitude of the expected tensor. fp32: rounding through the
# depth of the models at hand stays below a tenth of it. fp16: 2^-11 a product, some tens of them.
BOUNDS = {"fp32": 2e-4, "fp16": 3e-2}
IMAGE_BOUNDS = {"fp32": 1e-3, "fp16": 3e-2}  # absolute, of a picture in [0, 1]
# A token whose uniform lies this close to the end of its interval is a coin toss: rounding
# decides it, in PyTorch from one thread count to the next as well.
COIN_TOSS = {"fp32": 2e-5, "fp16": 5e-2}
# dB of a generation left to itself where codes are mixed: what rounds in one scale comes back up to
# 1/tau as large in the next (seen: 76 and 30 at worst; another picture has about 12)
MIXED_PSNR = {"fp32": 50.0, "fp16": 20.0}
# fp32 first: where it fails, the other precisions say little
WIDEST_FIRST = ("fp32", "fp16", "int8")

IMAGES = 4
TRACE_BYTES = 512 << 20  # most bytes of the references that are held at once
SAMPLES = 500
SAMPLES_SHARE = 0.8  # share of the progress that generating samples takes


def verify_bundle(
    bundle: Path | str,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    hints: Hints = NO_HINTS,
    modules: tuple[nn.Module, nn.Module] | None = None,
    precision: str | None = None,
    images: int = IMAGES,
    seed: int = 0,
    labels: str | Sequence[str | int] | None = None,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare a bundle with its PyTorch model and write the report into the manifest.

    The model is the preset, or the random weights, that the manifest names; otherwise files or
    modules must be given. Raises BundleError, CheckpointError or UsageError where there is nothing
    to compare, BundleError where the bundle changed meanwhile; a comparison that fails is in the
    report, and so is why it could not be stored, where the bundle cannot be written.

    Args:
        hints: what the files do not tell, where it is not as the manifest says.
        modules: transformer and tokenizer, of the published code or any of its interface
            (`held_modules`): their own forward gives the logits, the tokens of pictures and the
            images that the graphs are compared with.
        precision: these graphs alone; None takes all.
        images: how many are generated, rounded up to whole batches; image n has seed + n, as
            those of `generate` do.
        labels: names and numbers, repeated until there is one per image; None: other classes.
        samples: images per set for the class accuracy of int8, where there is a classifier of the
            model; 0 skips it.
    """
    check_count(samples)
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    own = None
    if modules is None:
        model = load_bundle_model(manifest, checkpoint, tokenizer, hints)
    elif checkpoint is not None or tokenizer is not None or hints != NO_HINTS:
        raise UsageError("modules have weights of their own: leave the checkpoint files out")
    else:
        model = model_of_modules(manifest, *modules)
        own = OwnForward(*modules, manifest.code_model("verify"))
    return verify_model(
        bundle,
        model,
        own=own,
        precision=precision,
        images=images,
        seed=seed,
        labels=labels,
        samples=samples,
        progress=progress,
    )


def verify_model(
    bundle: Path,
    model: LoadedModel | LoadedTextModel,
    *,
    own: OwnForward | None = None,
    precision: str | None = None,
    images: int = IMAGES,
    seed: int = 0,
    labels: str | Sequence[str | int] | None = None,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> VerifyReport:
    """Run `verify_bundle` with a model that is already loaded; `own` as in `trace_reference`."""
    check_count(samples)
    if images < 1:
        raise UsageError(f"images must be at least 1, found {images}")
    manifest = read_manifest(bundle)
    precisions = [precision] if precision else widest_first(manifest)
    for name in precisions:
        manifest.graph(name, names.DECODER)  # refuses a precision that the bundle lacks
    report = progress or (lambda message, fraction: None)
    launches: dict[int, list[str]] = {}  # precisions by the images of a launch
    for name in precisions:
        launches.setdefault(manifest.of(name).batch, []).append(name)
    compared = max(-(-images // batch) * batch for batch in launches)  # whole batches, in each
    groups: list[_Group] = []
    for members in launches.values():
        view = manifest.of(members[0])
        requests = _requests(view, seed, compared, labels)
        size = max(1, TRACE_BYTES // _trace_bytes(view))
        groups += [
            _Group(manifest=view, precisions=members, requests=requests[n : n + size], again=n > 0)
            for n in range(0, len(requests), size)
        ]
    found: dict[tuple[str, str], list[Check]] = {}  # of each graph, in the order of the first group
    study: SampleStudy | SkippedStudy | None = None
    sampled = "int8" in precisions and samples > 0
    steps = sum(len(group.precisions) for group in groups)
    before, step = (1 - SAMPLES_SHARE if sampled else 1.0) / steps, 0
    tolerances = {name: tolerance(name, more_smooth=manifest.more_smooth) for name in precisions}
    for group in groups:
        report("PyTorch reference", before * step)
        view = group.manifest
        references = [reference_of(model, view, seed, inputs, own) for inputs in group.requests]
        for name in group.precisions:
            graphs = sorted(manifest.graphs[name], key=run_order)
            verifier = GraphVerifier(
                bundle, view, name, references, tolerances[name], again=group.again
            )
            checks: list[Check] = []
            for j, graph in enumerate(graphs):
                report(f"{name}/{graph}", before * (step + (j + 1) / (len(graphs) + 1)))
                checks += verifier.graph(graph)
            checks += verifier.loops()
            step += 1
            for check in checks:
                found.setdefault((check.precision, check.graph), []).append(check)
            if name == "int8" and verifier.unfit:
                study = SkippedStudy(why=f"{verifier.unfit} cannot be run")
    if isinstance(model, LoadedTextModel):
        study = None  # there is no classifier of prompts
    elif "int8" in precisions and study is None:
        study = study_samples(
            bundle,
            manifest,
            model,
            count=samples,
            seed=seed,
            progress=lambda message, part: report(message, 1 - SAMPLES_SHARE * (1 - part)),
        )
    result = VerifyReport(
        checks=tuple(merged(checks) for checks in found.values()),
        labels=tuple(label for inputs in requests for label in inputs.labels),
        images=compared,
        seed=seed,
        oracle=own.name if own else "",
        samples=study,
        digest=manifest.digest(),
    )
    result = dataclasses.replace(result, unstored=_store(bundle, manifest, result))
    report("done", 1.0)
    return result


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Generations that are compared together, so that a graph is opened once for all of them.

    Attributes:
        manifest: that of the precisions, which have the same number of images per launch.
        requests: inputs of one launch each.
        again: whether these precisions had a group before.
    """

    manifest: Manifest
    precisions: Sequence[str]
    requests: Sequence[Inputs]
    again: bool


def _requests(
    manifest: Manifest, seed: int, images: int, labels: str | Sequence[str | int] | None
) -> list[Inputs]:
    """Return the inputs of the generations that are compared, one item per batch."""
    starts = range(0, images, manifest.batch)
    if manifest.takes_text:
        if labels is not None:
            raise UsageError("this bundle takes prompts, not labels: leave --labels out")
        return [inputs_of(manifest, seed, first) for first in starts]
    batches = [generation_inputs(manifest, seed, first) for first in starts]
    if labels is None:
        return [*batches]
    chosen = resolve_labels(labels, manifest.labels, manifest.model.transformer.classes)
    if len(chosen) > len(batches) * manifest.batch:
        raise LabelError(
            f"{len(chosen)} labels for {images} images: compare {len(chosen)} images or more, or "
            "give fewer labels"
        )
    repeated = itertools.cycle(chosen)
    return [batch._replace(labels=[next(repeated) for _ in batch.labels]) for batch in batches]


def _trace_bytes(manifest: Manifest) -> int:
    """Estimate the bytes of one batch's reference: logits, and keys and values, which every scale
    stores together with those of the scales before."""
    spec = manifest.model
    t, ends = spec.transformer, spec.prefix_lengths[1:]
    cache = 2 * t.depth * manifest.rows * t.width * (sum(ends) + spec.total_tokens)
    if isinstance(spec, TextModelSpec):
        logits = spec.total_tokens * spec.tokenizer.token_bits
        cache += 2 * t.depth * manifest.rows * t.width * spec.transformer.text_length
    else:
        logits = spec.total_tokens * spec.tokenizer.vocab_size
    return 4 * (cache + manifest.batch * logits)


def model_of_modules(
    manifest: Manifest, transformer: nn.Module, tokenizer: nn.Module
) -> LoadedModel:
    """Return the model of a bundle with the weights of modules in memory.

    Raises CheckpointError where their state dicts do not have the keys and shapes of the bundle's
    model.
    """
    weights = ModuleWeights(tokenizer_of(tokenizer)), ModuleWeights(transformer)
    spec = manifest.code_model("verify")
    return assemble(spec, *weights, labels=manifest.labels, defaults=manifest.defaults)


def _store(bundle: Path, manifest: Manifest, report: VerifyReport) -> str:
    """Write the report into the manifest; return why not where it cannot be written, else "".

    Raises BundleError where another bundle has taken the place of the verified one.
    """
    with locked_folder(bundle):
        there = read_manifest(bundle)
        if dataclasses.replace(there, parity=None) != dataclasses.replace(manifest, parity=None):
            raise BundleError(
                f"{bundle} changed while it was verified, and the report is not stored; verify it "
                "again"
            )
        try:
            dataclasses.replace(manifest, parity=report.to_json()).save(bundle)
        except BundleError as error:
            return str(error)
    return ""


def tolerance(precision: str, *, more_smooth: bool = False) -> Tolerance:
    """Return the bounds within which a graph of this precision agrees with the model."""
    rounded = precision == "int8"
    plain = "fp32" if rounded else precision
    kind = Int8Tolerance if rounded else FloatTolerance
    return kind(
        precision=plain,
        bound=BOUNDS[plain],
        image_bound=IMAGE_BOUNDS[plain],
        coin_toss=COIN_TOSS[plain],
        mixed_psnr=MIXED_PSNR[plain] if more_smooth else None,
    )


def widest_first(manifest: Manifest) -> list[str]:
    """Return the precisions of a bundle, the most accurate first."""
    return sorted(manifest.graphs, key=WIDEST_FIRST.index)


def run_order(graph: str) -> tuple[int, str]:
    """Sort key of graphs: the order of a generation, so that the first failure is the first
    cause."""
    conditions = {names.CONDITION: 0, names.UNCONDITIONAL: 0}
    last = (names.STEP, names.DECODER, names.ENCODER, names.ACCUMULATE)
    fixed = {**conditions, **{name: 2 + n for n, name in enumerate(last)}}
    return fixed.get(graph, 1), graph


def load_bundle_model(
    manifest: Manifest,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    hints: Hints = NO_HINTS,
) -> LoadedModel | LoadedTextModel:
    """Load the model that the manifest names, or the one in the given files.

    Facts that the files do not tell are those of the manifest, unless the hints give others. Raises
    UsageError where files are needed, are not those that the manifest names, or are of another
    architecture.
    """
    if manifest.takes_text:
        return load_text_bundle_model(manifest, checkpoint, tokenizer, hints)
    places = {part: source.get("key", TOP) for part, source in manifest.checkpoint.items()}
    parts: tuple[tuple[Part, Path | None, str], ...] = (
        ("transformer", checkpoint, hints.key or places["transformer"]),
        ("tokenizer", tokenizer, hints.tokenizer_key or places["tokenizer"]),
    )
    for part, file, key in parts:
        if file is not None:
            _check_origin(manifest, part, file, key)
    random = manifest.checkpoint["transformer"].get("random_weights")
    if checkpoint is None and tokenizer is None and random is not None:
        return load_model(manifest.preset, random_weights=random)
    if not manifest.preset and (checkpoint is None or tokenizer is None):
        raise UsageError(_what_to_give(manifest))
    model = load_model(
        manifest.preset or None,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        hints=hints,
        fallback=Hints(
            key=places["transformer"],
            tokenizer_key=places["tokenizer"],
            patch_nums=manifest.code_model("verify").patch_nums,
            heads=manifest.model.transformer.heads,
        ),
    )
    for option, told, source, place in (
        ("--key", hints.key, model.transformer, places["transformer"]),
        ("--tokenizer-key", hints.tokenizer_key, model.tokenizer, places["tokenizer"]),
    ):
        if told is not None and source.description.get("key", TOP) != place:
            raise UsageError(f"{option} {told}: this bundle was made from {place}")
    if model.spec != manifest.model:
        raise UsageError("these checkpoints are of another architecture than the bundle")
    return model


def load_text_bundle_model(
    manifest: Manifest,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    hints: Hints = NO_HINTS,
) -> LoadedTextModel:
    """Load the text-to-image model that the manifest names, as `load_bundle_model` does."""
    spec = manifest.model
    assert isinstance(spec, TextModelSpec)
    known = TEXT_PRESETS.get(manifest.preset)
    asked: dict[str, Any] = {}  # nothing, where the scales are the preset's own
    if known is None or known.scales.grids != spec.grids:
        scales = list_of(spec.grids)
        if scales is None:
            raise UsageError(
                "the scales of this bundle are of no published list: verify it in Python"
            )
        asked = {"resolution": scales.resolution, "aspect": scales.aspect}
    origin = manifest.checkpoint["transformer"]
    random = origin.get("random_weights") if checkpoint is None and tokenizer is None else None
    if random is None and not manifest.preset and (checkpoint is None or tokenizer is None):
        raise UsageError(_what_to_give(manifest))
    files: tuple[tuple[Part, Path | None], ...] = (
        ("transformer", checkpoint),
        ("tokenizer", tokenizer),
    )
    for part, file in files:
        if file is not None and manifest.checkpoint[part].get("sha256") != stored_sha256(file):
            raise UsageError(f"{file} is not the {part} that this bundle was made from")
    model = load_text_model(
        manifest.preset or None,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        random_weights=random,
        text_length=spec.transformer.text_length,
        hints=hints,
        **asked,
    )
    if model.spec != spec:
        raise UsageError("these checkpoints are of another architecture than the bundle")
    return model


def _what_to_give(manifest: Manifest) -> str:
    modules = {str(s["module"]) for s in manifest.checkpoint.values() if s.get("module")}
    if modules:
        return (
            f"this bundle was made from modules in memory ({', '.join(sorted(modules))}): give "
            "them with --module PACKAGE.FILE:FUNCTION, or files with their state dicts with "
            "--checkpoint and --tokenizer"
        )
    return (
        "this bundle was made from checkpoint files: give the same ones to verify with "
        "--checkpoint and --tokenizer"
    )


def _check_origin(manifest: Manifest, part: Part, file: Path, key: str) -> None:
    """Raise UsageError where a checkpoint is not the one that the bundle was made from."""
    origin = manifest.checkpoint.get(part) or {}
    again = f"its {part} has random weights of seed {origin.get('random_weights')}"
    if "random_weights" not in origin:
        expected = origin.get("sha256")
        if expected is None or not file.is_file():  # nothing to compare, or told when it is opened
            return
        saved = "module" in origin  # modules in memory: the hash is of the weights, not of a file
        found = (
            weights_sha256(open_checkpoint(file, part, default_key=key))
            if saved
            else file_sha256(file)
        )
        if found == expected:
            return
        name = f"a {origin['module']} in memory" if saved else origin.get("file", "another file")
        again = f"its {part} comes from {name}, sha256 {expected[:12]}, found {found[:12]}"
    raise UsageError(f"{file} is not the file this bundle was made from: {again}")
