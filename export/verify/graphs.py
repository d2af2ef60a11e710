"""Runs the graphs of one precision on the reference's inputs; a `Tolerance` evaluates the
results."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.bundle.graph_refs import GraphRef, graph_ref, held_layouts
from var_deploy.config import Layout
from var_deploy.errors import BackendError, BundleError, one_line
from var_deploy.export.verify.difference import (
    agreement,
    largest_error,
    norm_error,
)
from var_deploy.export.verify.graph_runner import GraphRunner, complete_step
from var_deploy.export.verify.reference import Inputs, Reference, ScaleTrace
from var_deploy.export.verify.report import LOOP, Check, merged
from var_deploy.export.verify.requests import inputs_of
from var_deploy.image.images import psnr
from var_deploy.manifest import Manifest
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import numbered

# number of the first image that is generated to test the decoder on: far from the images that an
# int8 decoder was calibrated with
FIRST_DRAWN = 1 << 16

Image = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]
T = TypeVar("T")


class Tolerance(Protocol):
    """The rules by which results of one precision agree with the model.

    Each method but `problems` takes a check that holds the measurements common to all precisions,
    and returns it with the verdict.

    Attributes:
        rules: what the graphs' own rules are for, such as "not for TensorRT 10.3".
        drawn: images that the loop generates to test the decoder on, 0 for none.
    """

    @property
    def rules(self) -> str: ...

    @property
    def drawn(self) -> int: ...

    def problems(self, graph: GraphRef, path: Path) -> list[str]:
        """Return how the file of a graph breaks the rules, one line per problem."""

    def condition(self, check: Check, expected: Tensors, found: Tensors) -> Check: ...

    def scale(self, check: Check, trace: ScaleTrace, found: Tensors) -> Check:
        """Evaluate one scale; the check has logits, top_1 and tokens.

        `found` holds the tokens as the graph sampled them; all its other values follow from the
        model's tokens.
        """

    def encoder(self, check: Check, expected: Tensors, found: Tensors) -> Check: ...

    def accumulate(self, check: Check, expected: Tensors, found: Tensors) -> Check: ...

    def decoder(self, check: Check) -> Check:
        """Evaluate the decoder; the check has the error and the PSNR of the worst image."""

    def loop(
        self, check: Check, traces: Sequence[ScaleTrace], tokens: Sequence[NDArray[Any]]
    ) -> Check:
        """Evaluate a free-running generation; the check has the image's error and PSNR, and
        tokens."""


class _UnfitError(Exception):
    """A graph cannot be run on the inputs that the manifest lists for it."""


def _attempt(work: Callable[[], T], how: str) -> T:
    try:
        return work()
    except Exception as error:  # onnx and ONNX Runtime raise types of their own
        raise _UnfitError(f"cannot be {how}: {one_line(error)}") from error


class GraphVerifier:
    """Runs the checks of one precision.

    Args:
        references: generations of the model, each of B images; a graph is opened once for all.
        again: whether these are further images of a bundle whose files were looked at, and whose
            decoder was tried, before.

    Attributes:
        unfit: the first graph that cannot be run at all, "" while there is none.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        precision: str,
        references: Sequence[Reference],
        tolerance: Tolerance,
        *,
        again: bool = False,
    ) -> None:
        self._bundle, self._manifest, self._precision = bundle, manifest, precision
        self._files = BundleFiles(bundle, manifest, precision)
        self._references, self._tolerance, self._again = references, tolerance, again
        self.unfit = ""

    def graph(self, name: str) -> list[Check]:
        """Check the file of one graph, and run it on the reference's inputs.

        Returns one check, or one per scale for `step`. Broken rules are told in the first of them.
        """
        path = self._bundle / self._manifest.graph(self._precision, name).file
        ref = graph_ref(self._manifest.model, self._precision, name)
        problems: list[str] = []
        try:
            if not self._again:
                problems = _attempt(lambda: self._tolerance.problems(ref, path), "loaded")
            checks = self._graph(ref)
        except _UnfitError as error:
            self.unfit = self.unfit or name
            checks = [self._blank(name).failed(str(error))]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            detail = f"{self._tolerance.rules}: {problems[0]}{more}"
            checks[0] = dataclasses.replace(checks[0], passed=False, detail=detail)
        return checks

    def _graph(self, ref: GraphRef) -> list[Check]:
        name = ref.name
        info = self._manifest.graph(self._precision, name)
        interior: dict[str, tuple[str, ...]] = dict.fromkeys(
            (names.CONDITION, names.UNCONDITIONAL, names.DECODER, names.ACCUMULATE), ()
        )
        interior[names.ENCODER] = (names.LATENT,)
        mass = (names.KEPT_MASS,) if self._manifest.more_smooth else ()
        shown = interior.get(name, (names.LOGITS, *mass))
        runner = _attempt(lambda: GraphRunner(self._files.graph(name), info, shown), "loaded")
        if ref.kind == "step":
            scales = range(self._manifest.model.scales)
            return [self._scales(runner, ref, f"{name} @ {k}", k) for k in scales]
        if ref.scale is not None:
            return [self._scales(runner, ref, name, ref.scale)]
        return [merged([self._fixed(runner, name, reference) for reference in self._references])]

    def _fixed(self, runner: GraphRunner, name: str, reference: Reference) -> Check:
        """Check a graph that is the same at every scale."""
        found = _run(runner, reference.graph_inputs(self._manifest, name))
        check = self._blank(name)
        if name in (names.CONDITION, names.UNCONDITIONAL):
            return self._tolerance.condition(check, reference.condition_of(name), found)
        if name == names.ENCODER:
            return self._tolerance.encoder(check, reference.encoded, found)
        if name == names.ACCUMULATE:
            return self._tolerance.accumulate(check, {names.F_HATS: reference.sums}, found)
        image = self._image(check, reference.trace.image, found[names.IMAGE])
        return self._tolerance.decoder(image)

    def _scales(self, runner: GraphRunner, ref: GraphRef, title: str, scale: int) -> Check:
        return merged([self._scale(runner, ref, title, scale, one) for one in self._references])

    def _scale(
        self, runner: GraphRunner, ref: GraphRef, title: str, scale: int, reference: Reference
    ) -> Check:
        trace, manifest = reference.trace.scales[scale], self._manifest
        inputs = reference.graph_inputs(manifest, ref.name, scale)
        if ref.kind == "step":
            inputs = complete_step(manifest, self._precision, scale, inputs)
        found = _run(runner, inputs)
        logits, tokens = trace.outputs[names.LOGITS], trace.outputs[names.TOKENS]
        differ = found[names.TOKENS] != tokens
        if manifest.more_smooth:
            # a mix turns small differences of logits into large ones, so what it makes of the
            # logits that the graph has is compared
            mass = found[names.KEPT_MASS]
            follows = reference.follow(scale, found[names.LOGITS], mass)
            trace = dataclasses.replace(trace, outputs={**trace.outputs, **follows})
        elif differ.any():  # outputs that follow from a token are compared with it forced
            every = np.ones_like(inputs[names.KEEP_MASK])
            forced = _run(runner, {**inputs, names.KEEP_MASK: every})
            found |= {k: forced[k] for k in (names.NEW_F_HAT, names.NEXT_INPUT) if k in found}
        check = dataclasses.replace(
            self._blank(title),
            logits=norm_error(logits, found[names.LOGITS]),
            top_1=reference.top_1(logits, found[names.LOGITS]),
            tokens=agreement(tokens, found[names.TOKENS]),
        )
        return self._tolerance.scale(check, trace, found)

    def loops(self) -> list[Check]:
        """Check a whole generation in every layout that the bundle holds, then the decoder on
        further images."""
        graphs = self._manifest.graphs[self._precision]
        checks, drawn = list[Check](), 0 if self._again else self._tolerance.drawn
        for layout in reversed(held_layouts(graphs)):
            blank = self._blank(f"{LOOP}{layout}")
            if self.unfit:
                checks.append(blank.failed(f"not run, because {self.unfit} is not right"))
                continue
            try:
                with self._open(layout) as loop:
                    found = [self._loop(loop, blank, one) for one in self._references]
                    checks.append(merged(found))
                    if drawn:
                        blank, drawn = self._blank(f"{names.DECODER} drawn"), 0
                        checks.append(self._drawn(loop, blank))
            except (BackendError, BundleError) as error:
                checks.append(blank.failed(str(error)))
        return checks

    @contextlib.contextmanager
    def _open(self, layout: Layout) -> Iterator[ScaleLoop]:
        loop = ScaleLoop(self._files, self._manifest, OrtCpuBackend(), self._precision, layout)
        try:
            yield loop
        finally:
            loop.close()

    def _loop(self, loop: ScaleLoop, check: Check, reference: Reference) -> Check:
        """Check the loop in one layout, from the reference's labels and uniforms."""
        traces = reference.trace.scales
        image = self._generate(loop, reference.inputs)
        tokens = loop.tokens()
        expected = np.concatenate([trace.outputs[names.TOKENS] for trace in traces], axis=1)
        agree = agreement(expected, np.concatenate(tokens, axis=1))
        check = dataclasses.replace(self._image(check, reference.trace.image, image), tokens=agree)
        return self._tolerance.loop(check, traces, tokens)

    def _drawn(self, loop: ScaleLoop, check: Check) -> Check:
        """Check the decoder on images that the loop generates; return the worst of them.

        The model's decoder on the same f_hat is the reference.
        """
        reference, found = self._references[0], list[Check]()
        manifest, seed = self._manifest, reference.seed
        for first in range(0, self._tolerance.drawn, manifest.batch):
            keys = numbered(seed, FIRST_DRAWN + first, manifest.batch)
            inputs = inputs_of(manifest, seed, FIRST_DRAWN + first, keys)
            image = self._generate(loop, inputs)
            found.append(self._image(check, reference.decode(loop.f_hat()), image))
        worst = min(found, key=lambda check: check.psnr or 0.0)
        count = len(found) * manifest.batch
        evaluated = self._tolerance.decoder(worst)
        return evaluated.remarked(f"the worst of {count} that it drew")

    def _generate(self, loop: ScaleLoop, inputs: Inputs) -> Image:
        sampling = self._manifest.defaults
        return loop.run(inputs.conditions, inputs.uniforms, sampling, noise=inputs.noise)

    def _image(self, check: Check, expected: Image, found: Image) -> Check:
        """Return `check` with the largest error of a batch, relative to 1, and the lowest PSNR."""
        error, _ = largest_error(expected, found)
        return dataclasses.replace(
            check,
            tensor=names.IMAGE,
            error=error,
            relative=error,
            psnr=min(psnr(*pair) for pair in zip(found, expected, strict=True)),
        )

    def _blank(self, graph: str) -> Check:
        return Check(precision=self._precision, graph=graph)


def _run(runner: GraphRunner, inputs: Tensors) -> dict[str, NDArray[Any]]:
    return _attempt(lambda: runner.run(inputs), "run")
