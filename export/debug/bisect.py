"""`verify --bisect A,B`: finds the first layer at which two backends differ.

Both backends get the inputs that the PyTorch model had at this point. Values are compared in the
order in which the graph computes them, also fp32 against fp16: these two graphs differ in casts, in
how the decoder up-samples its maps and in the widths of the sampler's passes; an up-sampling or a
sampler then counts as one node. int8 is refused: its rounding
shows in every layer, and `verify` says how much.

Values that follow from a decision are left out, because rounding changes decisions: the inside of
the sampler, whose tokens are compared by their margins and then forced, and the encoder's tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from var_deploy import names
from var_deploy.bundle.graph_refs import graph_ref
from var_deploy.errors import ExportError, UsageError
from var_deploy.export.checkpoint.hints import NO_HINTS, Hints
from var_deploy.export.debug.bisect_backends import RUNNERS, Runner
from var_deploy.export.lint.tensorrt import values_of
from var_deploy.export.verify.bundle import (
    BOUNDS,
    COIN_TOSS,
    load_bundle_model,
    run_order,
    widest_first,
)
from var_deploy.export.verify.difference import largest_error
from var_deploy.export.verify.graph_runner import complete_step
from var_deploy.export.verify.reference import Reference
from var_deploy.export.verify.requests import inputs_of, reference_of
from var_deploy.manifest import Manifest, check_files, read_manifest
from var_deploy.progress import Progress

AT_ONCE = 256 << 20  # bytes of values held of each backend
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
DECISIONS = ("sampler/", "quantize.scale_")  # of node names
BIT_ENCODER_SCALES = "scale_"  # of node names of an encoder that gives bits
UPSAMPLING = ".upsample.conv"  # end of the scope


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two sides of a bisection: a backend and the precision of the graphs that it
    runs."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.precision}"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first value whose difference is beyond the bound.

    Attributes:
        graph: such as "step @ 3".
        node, operator, value: in the second graph; "Upsample" and "Sample" stand for all nodes of
            one.
        error: largest difference over the largest magnitude; of tokens, their margin.
        inputs: each input of the node and its error, None for weights and constants.
    """

    graph: str
    node: str
    operator: str
    value: str
    error: float
    bound: float
    inputs: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """The result of `bisect`: `compared` values of `graphs`, and the divergence if there is one."""

    sides: tuple[Side, Side]
    graphs: tuple[str, ...]
    compared: int
    divergence: Divergence | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite error is null."""
        data = dataclasses.asdict(self) | {"sides": [str(side) for side in self.sides]}
        if self.divergence and not math.isfinite(self.divergence.error):
            data["divergence"]["error"] = None
        return data

    @property
    def headline(self) -> str:
        """Say the result in one line."""
        first, second = self.sides
        if self.divergence is None:
            where = ", ".join(self.graphs)
            return f"{first} and {second} agree on {self.compared} values of {where}"
        d = self.divergence
        return (
            f"{first} and {second} part in {d.graph} at {d.node} ({d.operator}): "
            f"off by {d.error:.2e}, bound {d.bound:.0e}"
        )

    def text(self) -> str:
        """Return the headline, and the inputs of the diverging node."""
        lines = [self.headline]
        if self.divergence:
            for name, error in self.divergence.inputs:
                how = "constant" if error is None else f"off by {error:.2e}"
                lines.append(f"  its input {name}: {how}")
        return "\n".join(lines)


def parse_sides(text: str, manifest: Manifest) -> tuple[Side, Side]:
    """ "onnxruntime:fp32,tensorrt:fp16" → two sides; a precision that is left out is the widest.

    Raises UsageError, or BundleError for a precision that the bundle lacks.
    """
    sides = []
    for part in text.split(","):
        backend, _, precision = part.strip().partition(":")
        if backend not in RUNNERS:
            raise UsageError(f"--bisect knows {', '.join(RUNNERS)}, found {backend!r}")
        precision = precision or widest_first(manifest)[0]
        if precision == "int8":
            raise UsageError(
                "--bisect compares fp32 and fp16: int8 rounds every layer; "
                "var-deploy verify says what it does to each scale"
            )
        manifest.graph(precision, names.DECODER)
        sides.append(Side(backend=backend, precision=precision))
    if len(sides) != 2 or sides[0] == sides[1]:
        raise UsageError(f"--bisect takes two different backends, found {text!r}")
    return sides[0], sides[1]


def bisect_bundle(
    bundle: Path,
    backends: str,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    hints: Hints = NO_HINTS,
    graph: str | None = None,
    progress: Progress | None = None,
) -> Bisection:
    """Run `bisect` on the inputs of the PyTorch model that the bundle was made from.

    `backends` is such as "onnxruntime:fp32,pytorch:fp16". Raises what `bisect` and `verify` raise.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    sides = parse_sides(backends, manifest)
    _choose(manifest, sides, graph)  # a wrong name is told before the model is run
    model = load_bundle_model(manifest, checkpoint, tokenizer, hints)
    if progress:
        progress("PyTorch reference", 0.0)
    reference = reference_of(model, manifest, 0, inputs_of(manifest, 0, 0))
    return bisect(bundle, manifest, reference, sides, graph=graph, progress=progress)


def bisect(
    bundle: Path,
    manifest: Manifest,
    reference: Reference,
    sides: tuple[Side, Side],
    *,
    graph: str | None = None,
    runners: Mapping[str, Runner] = RUNNERS,
    progress: Progress | None = None,
) -> Bisection:
    """Compare two backends node by node, and stop at the first that differs.

    `graph` names one graph, "step @ 3" one scale of `step`; without it the graph that failed first
    in the last `verify` is taken, or all of them. Raises UsageError for an unknown graph and
    BackendError where a backend is missing or fails.
    """
    compared, done = 0, list[str]()
    chosen = _choose(manifest, sides, graph)
    for number, (name, scale) in enumerate(chosen):
        title = f"{name} @ {scale}" if name == names.STEP else name
        if progress:
            progress(title, number / len(chosen))
        comparison = _Comparison(bundle, manifest, reference, sides, name, scale)
        divergence = comparison.run(runners)
        compared, done = compared + comparison.compared, [*done, title]
        if divergence:
            divergence = dataclasses.replace(divergence, graph=title)
            return Bisection(
                sides=sides, graphs=tuple(done), compared=compared, divergence=divergence
            )
    return Bisection(sides=sides, graphs=tuple(done), compared=compared, divergence=None)


def _choose(
    manifest: Manifest, sides: tuple[Side, Side], wanted: str | None
) -> list[tuple[str, int]]:
    """Choose the graphs and their scales, in the order of a generation."""
    every: list[tuple[str, int]] = []
    held = set(manifest.graphs[sides[0].precision]) & set(manifest.graphs[sides[1].precision])
    for name in sorted(held, key=run_order):
        ref = graph_ref(manifest.model, sides[0].precision, name)
        if ref.kind == "step":
            every += [(name, k) for k in range(manifest.model.scales)]
        else:
            every.append((name, ref.scale or 0))
    if wanted is None:
        # a report on other files says nothing of these; an old one does not say on which it is
        stale = manifest.parity_is_current() is False
        checks = [] if stale else (manifest.parity or {}).get("checks", [])
        failed = [c["graph"] for c in checks if not c["passed"] and c["precision"] != "int8"]
        wanted = failed[0] if failed and not failed[0].startswith("loop") else None
    if wanted is None:
        return every
    name, _, scale = wanted.partition(" @ ")
    chosen = [pair for pair in every if pair[0] == name and scale in ("", str(pair[1]))]
    if not chosen:
        raise UsageError(f"no graph {wanted!r}; there are {', '.join(sorted(held))}")
    return chosen


class _Comparison:
    """The comparison of one graph at one scale."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        reference: Reference,
        sides: tuple[Side, Side],
        name: str,
        scale: int,
    ) -> None:
        self._sides, self.compared = sides, 0
        bits = manifest.takes_text and name == names.ENCODER
        self._decisions = (*DECISIONS, BIT_ENCODER_SCALES) if bits else DECISIONS
        half = any(side.precision == "fp16" for side in sides)
        self._bound = BOUNDS["fp16" if half else "fp32"]
        self._coin_toss = COIN_TOSS["fp16" if half else "fp32"]
        self._files, self._inputs, self._graphs = [], [], []
        for side in sides:
            info = manifest.graph(side.precision, name)
            feeds: dict[str, Any] = dict(reference.graph_inputs(manifest, name, scale))
            if names.KEEP_MASK in feeds:
                feeds[names.KEEP_MASK] = np.ones_like(feeds[names.KEEP_MASK])
            if name == names.STEP:
                feeds = complete_step(manifest, side.precision, scale, feeds)
            inputs = {t.name: np.asarray(feeds[t.name], t.dtype, order="C") for t in info.inputs}
            self._files.append(bundle / info.file)
            self._inputs.append(inputs)
            self._graphs.append(_Graph(self._files[-1], inputs))
        self._trace = reference.trace.scales[scale] if names.KEEP_MASK in feeds else None
        self._errors: dict[str, float] = {}

    def run(self, runners: Mapping[str, Runner]) -> Divergence | None:
        for part in self._parts():
            wanted = list(zip(*part, strict=True))
            first, second = (
                runners[side.backend](self._files[i], self._inputs[i], wanted[i])
                for i, side in enumerate(self._sides)
            )
            for one, other in part:
                if one in first and other in second:
                    self.compared += 1
                    divergence = self._compare(other, first[one], second[other])
                    if divergence:
                        return divergence
        return None

    def _parts(self) -> Iterator[list[tuple[str, str]]]:
        """Yield pairs of values with the same meaning, in order, about `AT_ONCE` bytes at a
        time."""
        one, other = self._graphs
        if one.kinds() != other.kinds():
            one.join()
            other.join()
        if one.kinds() != other.kinds():
            raise ExportError("the graphs of the two precisions are not the same network")
        choice = other.choice
        part: list[tuple[str, str]] = []
        size = 0
        for a, b in zip(one.nodes, other.nodes, strict=True):
            for pair in zip(a.output, b.output, strict=True):
                decided = a.name.startswith(self._decisions) or not one.is_float(pair[0])
                if decided and pair[1] != choice:
                    continue
                part.append(pair)
                size += one.nbytes(pair[0])
                if size > AT_ONCE:
                    yield part
                    part, size = [], 0
        if part:
            yield part

    def _compare(self, name: str, first: NDArray[Any], second: NDArray[Any]) -> Divergence | None:
        graph, bound = self._graphs[1], self._bound
        if name == graph.choice:
            assert self._trace is not None  # only scales draw
            error = float(self._trace.margins[first != second].max(initial=0.0))
            bound = self._coin_toss
        else:
            _, error = largest_error(first, second)
        self._errors[name] = error
        if error <= bound:
            return None
        node = next(node for node in graph.nodes if name in node.output)
        return Divergence(
            graph="",
            node=node.name,
            operator=node.op_type,
            value=name,
            error=error,
            bound=bound,
            inputs=tuple((value, self._error_of(value)) for value in node.input if value),
        )

    def _error_of(self, name: str) -> float | None:
        graph = self._graphs[1]
        if name in graph.constants:
            return None
        return self._errors.get(graph.source.get(name, name), 0.0)


class _Graph:
    """The nodes of a graph without the casts between fp32 and fp16, in which precisions differ.

    Attributes:
        source: value made by such a cast → what it was made of.
        choice: the drawn tokens, "" outside the scales.
    """

    def __init__(self, path: Path, inputs: Mapping[str, NDArray[Any]]) -> None:
        model = onnx.load(str(path), load_external_data=False)
        for value in model.graph.input:  # fixed input shapes, so that all sizes are known
            del value.type.tensor_type.shape.dim[:]
            for size in inputs[value.name].shape:
                value.type.tensor_type.shape.dim.add(dim_value=size)
        del model.graph.value_info[:]
        self._values = values_of(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
        self.constants = {t.name for t in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.source: dict[str, str] = {}
        self.choice = ""
        for node in model.graph.node:
            cast = node.op_type == "Cast" and self.is_float(node.input[0])
            if cast and self.is_float(node.output[0]):
                self.source[node.output[0]] = self.source.get(node.input[0], node.input[0])
                continue
            self.nodes.append(node)
            if names.TOKENS in node.output:
                self.choice = node.input[2]

    def kinds(self) -> list[tuple[str, str]]:
        return [_kind(node) for node in self.nodes]

    def join(self) -> None:
        """Replace each up-sampling and each sampler by one node that makes its result.

        An up-sampling is a copy and one convolution in fp16, and four small convolutions in fp32; a
        sampler has wider passes in fp16.
        """
        joined: list[onnx.NodeProto] = []
        for operator, nodes in itertools.groupby(self.nodes, _joined_as):
            group = list(nodes)
            if operator:
                outputs = {name for node in group for name in node.output}
                inputs = [self.source.get(i, i) for node in group for i in node.input if i]
                outside = list(dict.fromkeys(name for name in inputs if name not in outputs))
                results = [self.choice] if self.choice in outputs else list(group[-1].output)
                scope = group[-1].name.partition("/")[0]
                group = [helper.make_node(operator, outside, results, f"{scope}/{operator}_0")]
            joined += group
        self.nodes = joined

    def is_float(self, name: str) -> bool:
        return name in self._values and self._values[name].elem_type in FLOATS

    def nbytes(self, name: str) -> int:
        sizes = [d.dim_value or 1 for d in self._values[name].shape.dim]
        return int(np.prod(sizes, dtype=np.int64)) * 4


def _joined_as(node: onnx.NodeProto) -> str:
    """Return what a node is part of, "Upsample" or "Sample"; "" for a node by itself.

    Resize is used for up-sampling alone.
    """
    scope = node.name.partition("/")[0]
    if node.op_type == "Resize" or scope.endswith(UPSAMPLING):
        return "Upsample"
    return "Sample" if scope == "sampler" else ""


def _kind(node: onnx.NodeProto) -> tuple[str, str]:
    """Return operator and layer of a node, without the number in its name, which counts casts
    too."""
    return node.op_type, node.name.rpartition("_")[0]
