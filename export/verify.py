"""`verify`: is the deployed model the model?

Every graph is checked against what it must not hold, then run on the inputs that the PyTorch model
had at this point, so that an error cannot hide behind an earlier one; its outputs are compared in
the order names, shapes, values. Then the whole loop runs on its own from the same uniforms. Where
int8 is among the precisions, many images are drawn and judged at last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.export.checkpoint import LoadedModel, load_model
from var_deploy.export.reference import trace_reference
from var_deploy.export.report import Check, Report
from var_deploy.export.sample_study import (
    SampleStudy,
    SkippedStudy,
    check_count,
    study_samples,
)
from var_deploy.export.verify_floats import FloatTolerance
from var_deploy.export.verify_graphs import GraphVerifier, Tolerance
from var_deploy.export.verify_int8 import Int8Tolerance
from var_deploy.manifest import Manifest, check_files, read_manifest

# Largest difference over the largest magnitude of the expected tensor. fp32: rounding through the
# depth of the models at hand stays below a tenth of it. fp16: 2^-11 a product, some tens of them.
BOUNDS = {"fp32": 2e-4, "fp16": 3e-2}
IMAGE_BOUNDS = {"fp32": 1e-3, "fp16": 3e-2}  # absolute, of a picture in [0, 1]
# A token whose uniform lies this close to the end of its interval is a toss of the coin: rounding
# decides it, in PyTorch from one thread count to the next as well.
COIN_TOSS = {"fp32": 2e-5, "fp16": 5e-2}
# dB of a generation left to itself where codes are mixed: what rounds in one scale comes back up to
# 1/tau as large in the next (seen: 76 and 30 at worst; another picture has about 12)
MIXED_PSNR = {"fp32": 50.0, "fp16": 20.0}
# where fp32 fails, what the others do says little
WIDEST_FIRST = ("fp32", "fp16", "int8")

SAMPLES = 500
SAMPLES_SHARE = 0.8  # of the progress that is told, where they are drawn

Progress = Callable[[str, float], None]


def verify_bundle(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    precision: str | None = None,
    seed: int = 0,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with its PyTorch model and write the report into the manifest.

    The model is the preset, or the random weights, that the manifest names; otherwise the files
    must be given. Raises BundleError, CheckpointError or UsageError where there is nothing to
    compare; a comparison that fails is in the report.

    Args:
        precision: these graphs alone; None takes all.
        samples: images per set for the class accuracy of int8, where there is a classifier of the
            model; 0 skips it.
    """
    check_count(samples)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    model = load_bundle_model(manifest, checkpoint, tokenizer)
    return verify_model(
        bundle, model, precision=precision, seed=seed, samples=samples, progress=progress
    )


def verify_model(
    bundle: Path,
    model: LoadedModel,
    *,
    precision: str | None = None,
    seed: int = 0,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Report:
    """`verify_bundle` with a model that is already at hand."""
    check_count(samples)
    manifest = read_manifest(bundle)
    precisions = [precision] if precision else widest_first(manifest)
    for name in precisions:
        manifest.graph(name, names.DECODER)  # refuses a precision that the bundle lacks
    report = progress or (lambda message, fraction: None)
    report("PyTorch reference", 0.0)
    reference = trace_reference(model, manifest, seed)
    checks: list[Check] = []
    study: SampleStudy | SkippedStudy | None = None
    sampled = "int8" in precisions and samples > 0
    before = (1 - SAMPLES_SHARE if sampled else 1.0) / len(precisions)
    for i, name in enumerate(precisions):
        graphs = sorted(manifest.graphs[name], key=run_order)
        judged = tolerance(name, more_smooth=manifest.more_smooth)
        verifier = GraphVerifier(bundle, manifest, name, reference, judged)
        for j, graph in enumerate(graphs):
            report(f"{name}/{graph}", before * (i + (j + 1) / (len(graphs) + 1)))
            checks += verifier.graph(graph)
        checks += verifier.loops()
        if name == "int8" and verifier.unfit:
            study = SkippedStudy(why=f"{verifier.unfit} cannot be run")
    if "int8" in precisions and study is None:
        study = study_samples(
            bundle,
            manifest,
            model,
            count=samples,
            seed=seed,
            progress=lambda message, part: report(message, 1 - SAMPLES_SHARE * (1 - part)),
        )
    result = Report(
        checks=tuple(checks), labels=tuple(reference.labels), seed=seed, samples=study
    )
    dataclasses.replace(manifest, parity=result.to_json()).save(bundle)
    report("done", 1.0)
    return result


def tolerance(precision: str, *, more_smooth: bool = False) -> Tolerance:
    """What agrees with the model in `precision`."""
    rounded = precision == "int8"
    plain = "fp32" if rounded else precision
    floats = FloatTolerance(
        precision=plain,
        bound=BOUNDS[plain],
        image_bound=IMAGE_BOUNDS[plain],
        coin_toss=COIN_TOSS[plain],
        mixed_psnr=MIXED_PSNR[plain] if more_smooth else None,
    )
    return Int8Tolerance(exact=floats) if rounded else floats


def widest_first(manifest: Manifest) -> list[str]:
    """The precisions of a bundle."""
    return sorted(manifest.graphs, key=WIDEST_FIRST.index)


def run_order(graph: str) -> tuple[int, str]:
    """Graphs as a generation meets them, so that the first failure is the first cause."""
    last = (names.STEP, names.DECODER, names.ENCODER, names.ACCUMULATE)
    fixed = {names.CONDITION: 0, **{name: 2 + n for n, name in enumerate(last)}}
    return fixed.get(graph, 1), graph


def load_bundle_model(
    manifest: Manifest, checkpoint: Path | None = None, tokenizer: Path | None = None
) -> LoadedModel:
    """The model that the manifest names, or the one in the files that are given.

    Raises UsageError where files are needed or are of another architecture.
    """
    random = manifest.checkpoint["transformer"].get("random_weights")
    if checkpoint is None and tokenizer is None and random is not None:
        return load_model(manifest.preset, random_weights=random)
    if not manifest.preset and (checkpoint is None or tokenizer is None):
        raise UsageError(
            "this bundle was made from checkpoint files: give the same ones to verify with "
            "--checkpoint and --tokenizer"
        )
    heads = manifest.model.transformer.heads
    model = load_model(
        manifest.preset or None, checkpoint=checkpoint, tokenizer=tokenizer, heads=heads
    )
    if model.spec != manifest.model:
        raise UsageError("these checkpoints are of another architecture than the bundle")
    return model
