"""`verify`: is the deployed model the model?

Every graph is checked against what TensorRT takes, then run on the inputs that the PyTorch model
had at this point, so that an error cannot hide behind an earlier one; its outputs are compared in
the order names, shapes, values. Then the whole loop runs on its own from the same uniforms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.export.checkpoint import LoadedModel, build_modules, load_model
from var_deploy.export.graph_runner import GraphRunner, complete_step
from var_deploy.export.lint import lint_file
from var_deploy.export.reference import Arrays, Trace, trace_generation
from var_deploy.export.report import Check, Report
from var_deploy.images import psnr
from var_deploy.manifest import Manifest, check_files, read_manifest
from var_deploy.runtime.loop import Layout, ScaleLoop
from var_deploy.runtime.onnxruntime_cpu import OrtCpuBackend
from var_deploy.sampling import uniforms

# Largest difference over the largest magnitude of the expected tensor. fp32: rounding through the
# depth of the models at hand stays below a tenth of it. fp16: 2^-11 a product, some tens of them.
BOUNDS = {"fp32": 2e-4, "fp16": 3e-2}
IMAGE_BOUNDS = {"fp32": 1e-3, "fp16": 3e-2}  # absolute, of a picture in [0, 1]
# A token whose uniform lies this close to the end of its interval is a toss of the coin: rounding
# decides it, in PyTorch from one thread count to the next as well.
COIN_TOSS = {"fp32": 2e-5, "fp16": 5e-2}

Progress = Callable[[str, float], None]
T = TypeVar("T")


def verify_bundle(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with its PyTorch model and write the report into the manifest.

    The model is the preset, or the random weights, that the manifest names; otherwise the files
    must be given. Raises BundleError, CheckpointError or UsageError where there is nothing to
    compare; a comparison that fails is in the report.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    model = load_bundle_model(manifest, checkpoint, tokenizer)
    return verify_model(bundle, model, precision=precision, seed=seed, progress=progress)


def verify_model(
    bundle: Path,
    model: LoadedModel,
    *,
    precision: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """`verify_bundle` with a model that is already at hand."""
    manifest = read_manifest(bundle)
    # the widest first: where fp32 fails, what fp16 does says little
    precisions = [precision] if precision else sorted(manifest.graphs, reverse=True)
    for name in precisions:
        manifest.graph(name, names.DECODER)  # refuses a precision that the bundle lacks
    report = progress or (lambda message, fraction: None)
    report("PyTorch reference", 0.0)
    reference = trace_reference(model, manifest, seed)
    checks: list[Check] = []
    for i, name in enumerate(precisions):
        graphs = sorted(manifest.graphs[name], key=run_order)
        verifier = _Verifier(bundle, manifest, name, reference)
        for j, graph in enumerate(graphs):
            report(f"{name}/{graph}", (i + (j + 1) / (len(graphs) + 1)) / len(precisions))
            checks += verifier.graph(graph)
        checks += verifier.loops()
    result = Report(checks=tuple(checks), labels=tuple(reference.labels), seed=seed)
    dataclasses.replace(manifest, parity=result.to_json()).save(bundle)
    report("done", 1.0)
    return result


def run_order(graph: str) -> tuple[int, str]:
    """Graphs as a generation meets them, so that the first failure is the first cause."""
    fixed = {names.CONDITION: 0, names.STEP: 2, names.DECODER: 3, names.ENCODER: 4}
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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A generation of the PyTorch model, and what its encoder makes of the image.

    Attributes:
        labels: one an image.
        encoded: the encoder's latent and tokens by tensor name.
    """

    labels: list[int]
    trace: Trace
    encoded: Arrays

    def inputs(self, manifest: Manifest, graph: str, scale: int = 0) -> Arrays:
        """What a graph was given; of `step`, what the static graph of `scale` is given."""
        if graph == names.CONDITION:
            rows = np.full(manifest.rows, manifest.model.transformer.classes)
            rows[: len(self.labels)] = self.labels
            return {names.LABELS: rows}
        if graph == names.DECODER:
            return {names.F_HAT: self.trace.f_hat}
        if graph == names.ENCODER:
            return {names.IMAGE: self.trace.image}
        trace, settings = self.trace.scales[scale], manifest.defaults
        tokens = trace.outputs[names.TOKENS]
        return {
            **trace.inputs,
            names.CFG: np.array(settings.guidance(scale, manifest.model.scales)),
            names.TEMPERATURE: np.array(settings.temperature),
            names.TOP_K: np.array(settings.top_k),
            names.TOP_P: np.array(settings.top_p),
            names.KEEP_MASK: np.zeros(tokens.shape, np.bool_),
            names.KEEP_TOKENS: tokens,
        }


def trace_reference(model: LoadedModel, manifest: Manifest, seed: int) -> Reference:
    """Generate B images with the PyTorch model, and encode them."""
    spec, batch = manifest.model, manifest.batch
    classes = max(spec.transformer.classes, 1)
    labels = [(7 * i + seed) % classes for i in range(batch)]
    draws = np.stack([uniforms(seed, i, spec.total_tokens) for i in range(batch)])
    tokenizer, transformer = build_modules(model)
    trace = trace_generation(
        tokenizer, transformer, labels, draws, manifest.defaults, manifest.guidance
    )
    with torch.no_grad():
        image = torch.from_numpy(trace.image).permute(0, 3, 1, 2) * 2 - 1
        latent = tokenizer.features(image)
        encoded = {names.LATENT: latent.numpy()}
        for k, _, tokens, _ in tokenizer.quantize.encode(latent):
            encoded[names.encoder_tokens(k)] = tokens.numpy()
    return Reference(labels=labels, trace=trace, encoded=encoded)


class _UnfitError(Exception):
    """A graph cannot be run on what the manifest says it takes."""


def _attempt(read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # onnx and ONNX Runtime raise types of their own
        raise _UnfitError(f"cannot be loaded: {' '.join(str(error).split())}") from error


class _Verifier:
    """The checks of one precision."""

    def __init__(
        self, bundle: Path, manifest: Manifest, precision: str, reference: Reference
    ) -> None:
        self._bundle, self._manifest, self._precision = bundle, manifest, precision
        self._reference, self._trace = reference, reference.trace
        self._bound = BOUNDS[precision]
        self._unfit = ""  # the first graph that cannot be run at all

    def graph(self, name: str) -> list[Check]:
        """Lint one graph and run it on the reference's inputs: a check, or one a scale for `step`.

        What TensorRT would refuse is told in the first of them.
        """
        path = self._bundle / self._manifest.graph(self._precision, name).file
        refused: list[str] = []
        try:
            refused = _attempt(lambda: lint_file(path, self._precision))
            checks = self._graph(name, path)
        except _UnfitError as error:
            self._unfit = self._unfit or name
            checks = [self._failed(name, str(error))]
        if refused:
            more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            detail = f"not for TensorRT 10.3: {refused[0]}{more}"
            checks[0] = dataclasses.replace(checks[0], passed=False, detail=detail)
        return checks

    def _graph(self, name: str, path: Path) -> list[Check]:
        info = self._manifest.graph(self._precision, name)
        interior = {names.CONDITION: "", names.DECODER: "", names.ENCODER: names.LATENT}
        runner = _attempt(lambda: GraphRunner(path, info, interior.get(name, names.LOGITS)))
        if runner.mismatch:
            raise _UnfitError(runner.mismatch)
        if name == names.CONDITION:
            found = self._run(runner, name)
            return [self._compare(name, self._trace.condition, found)]
        if name == names.DECODER:
            return [self._decoder(runner)]
        if name == names.ENCODER:
            return [self._encoder(runner)]
        if name == names.STEP:
            scales = range(self._manifest.model.scales)
            return [self._scale(runner, f"{name} @ {k}", k) for k in scales]
        return [self._scale(runner, name, int(name.rpartition("_")[2]))]

    def loops(self) -> list[Check]:
        """The whole generation in every layout that the bundle holds."""
        graphs = self._manifest.graphs[self._precision]
        layouts: list[Layout] = ["shared"] if names.STEP in graphs else []
        if names.scale_graph(0) in graphs:
            layouts.append("per-scale")
        return [self._loop(layout) for layout in layouts]

    def _loop(self, layout: Layout) -> Check:
        if self._unfit:
            return self._failed(f"loop {layout}", f"not run, because {self._unfit} is not right")
        spec, labels = self._manifest.model, self._reference.labels
        loop = ScaleLoop(self._bundle, self._manifest, OrtCpuBackend(), self._precision, layout)
        try:
            draws = np.concatenate(
                [trace.inputs[names.UNIFORMS] for trace in self._trace.scales], axis=1
            )
            image = loop.run(labels, draws, self._manifest.defaults).copy()
            tokens = loop.tokens()
        finally:
            loop.close()
        expected = [trace.outputs[names.TOKENS] for trace in self._trace.scales]
        agree = sum(int((a == b).sum()) for a, b in zip(tokens, expected, strict=True))
        total = spec.total_tokens * len(labels)
        error = float(np.nan_to_num(np.abs(image - self._trace.image), nan=np.inf).max())
        bound = IMAGE_BOUNDS[self._precision]
        detail, passed = "", True
        if agree < total:
            first = next(k for k, e in enumerate(expected) if (tokens[k] != e).any())
            differ = tokens[first] != expected[first]
            margin = float(self._trace.scales[first].margins[differ].max())
            passed = margin <= COIN_TOSS[self._precision]
            why = "by rounding" if passed else "beyond rounding"
            detail = f"tokens part at scale {first} {why} (margin {margin:.1e})"
        elif error > bound:
            passed, detail = False, f"{names.IMAGE} is off by {error:.2e}, bound {bound:.0e}"
        return Check(
            precision=self._precision,
            graph=f"loop {layout}",
            tensor=names.IMAGE,
            error=error,
            relative=error,
            bound=bound,
            tokens=f"{agree}/{total}",
            psnr=psnr(image, self._trace.image),
            passed=passed,
            detail=detail,
        )

    def _run(self, runner: GraphRunner, name: str) -> Arrays:
        return runner.run(self._reference.inputs(self._manifest, name))

    def _scale(self, runner: GraphRunner, name: str, scale: int) -> Check:
        trace, manifest = self._trace.scales[scale], self._manifest
        graph = name.partition(" ")[0]
        inputs = self._reference.inputs(manifest, graph, scale)
        if graph == names.STEP:
            inputs = complete_step(manifest, self._precision, scale, inputs)
        found = runner.run(inputs)
        expected = {k: v for k, v in trace.outputs.items() if k in found}
        wanted = expected.pop(names.TOKENS)
        differ = found.pop(names.TOKENS) != wanted
        if differ.any():  # what follows from a token is compared with the token forced
            forced = runner.run({**inputs, names.KEEP_MASK: np.ones_like(differ)})
            found |= {k: forced[k] for k in (names.NEW_F_HAT, names.NEXT_INPUT) if k in found}
        check = self._compare(name, expected, found)
        margin = float(trace.margins[differ].max(initial=0.0))
        agreement = f"{differ.size - int(differ.sum())}/{differ.size}"
        detail, passed = check.detail, check.passed
        if margin > COIN_TOSS[self._precision] and passed:
            passed, detail = False, f"{names.TOKENS} differ beyond rounding (margin {margin:.1e})"
        elif differ.any() and passed:
            detail = f"{int(differ.sum())} tokens differ by rounding (margin {margin:.1e})"
        return dataclasses.replace(check, tokens=agreement, passed=passed, detail=detail)

    def _decoder(self, runner: GraphRunner) -> Check:
        found = self._run(runner, names.DECODER)
        check = self._compare(names.DECODER, {names.IMAGE: self._trace.image}, found)
        bound = IMAGE_BOUNDS[self._precision]
        passed = check.error <= bound
        detail = "" if passed else f"{names.IMAGE} is off by {check.error:.2e}, bound {bound:.0e}"
        return dataclasses.replace(
            check,
            bound=bound,
            relative=check.error,
            psnr=psnr(found[names.IMAGE], self._trace.image),
            passed=passed,
            detail=detail,
        )

    def _encoder(self, runner: GraphRunner) -> Check:
        found, encoded = self._run(runner, names.ENCODER), self._reference.encoded
        latent = {names.LATENT: found.pop(names.LATENT)}
        check = self._compare(names.ENCODER, {names.LATENT: encoded[names.LATENT]}, latent)
        agree = sum(int((found[k] == encoded[k]).sum()) for k in found)
        total = sum(found[k].size for k in found)
        # one code that rounding tips changes the residuals of all later scales, so in fp32 the
        # tokens must agree all but for such a tip, in fp16 the latent alone is bound
        passed = check.passed and (self._precision != "fp32" or agree >= 0.98 * total)
        detail = check.detail
        if check.passed and not passed:
            detail = f"tokens of the encoder differ in {total - agree} of {total}"
        return dataclasses.replace(check, tokens=f"{agree}/{total}", passed=passed, detail=detail)

    def _compare(
        self, name: str, expected: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]
    ) -> Check:
        """Largest error over all tensors; names the first that leaves the bound."""
        worst = Check(precision=self._precision, graph=name, bound=self._bound, passed=True)
        failure = ""
        for tensor, want in expected.items():
            got = found[tensor].astype(np.float32)
            error = float(np.abs(got - want).max())
            relative = error / max(float(np.abs(want).max()), 1e-6)
            if not np.isfinite(got).all():
                error = relative = float("inf")
            if relative >= worst.relative:
                worst = dataclasses.replace(worst, tensor=tensor, error=error, relative=relative)
            if relative > self._bound and not failure:
                where = np.unravel_index(int(np.abs(got - want).argmax()), want.shape)
                place = ", ".join(str(int(i)) for i in where)
                failure = f"{tensor} is off by {relative:.2e} at [{place}], bound {self._bound:.0e}"
        return dataclasses.replace(worst, passed=not failure, detail=failure)

    def _failed(self, name: str, why: str) -> Check:
        return Check(precision=self._precision, graph=name, passed=False, detail=why)
