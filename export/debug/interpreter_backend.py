"""The interpreter as a backend of the scale loop: runs graphs in true fp16 on any CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.files import BundleFiles, GraphFile
from var_deploy.export.checkpoint.drawn_prompts import drawn_prompts
from var_deploy.export.debug.interpreter import OnValue, TorchGraph
from var_deploy.labels import spread_labels
from var_deploy.manifest import Manifest
from var_deploy.progress import Progress
from var_deploy.runtime.backends.host_memory import HostMemory, host_view
from var_deploy.runtime.backends.protocol import Arrays, Backend, Launch
from var_deploy.runtime.buffers import Conditions
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import gumbel, numbered, stack_uniforms
from var_deploy.spec import TextModelSpec

Watch = Callable[[str], OnValue]  # graph name → callback for its values


class StudyBackend(Backend, Protocol):
    """A backend that also records the tokens that each scale sampled."""

    choices: list[NDArray[np.int64]]


OpenStudyBackend = Callable[[Watch | None, Callable[[str], None]], StudyBackend]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Results of a generation: tokens [B, L_k] or bits [B, L_k, e] of each scale, and the image
    [B, height, width, channels]."""

    tokens: list[NDArray[Any]]
    image: NDArray[Any]


def generate(
    bundle: Path,
    manifest: Manifest,
    precision: str,
    conditions: Conditions,
    *,
    first: int = 0,
    seed: int = 0,
    forced: Sequence[NDArray[Any]] | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
    open_backend: OpenStudyBackend | None = None,
) -> Generation:
    """Generate B images with the bundle's default settings.

    Args:
        conditions: B class numbers, or the features of B prompts.
        first: number of the first image of the batch; it decides the uniforms.
        forced: tokens that take the place of the drawn ones, so that every scale starts from the
            same tokens as another generation. The drawn ones are returned all the same.
        open_backend: makes the backend from `watch` and a callback for titles; None takes the
            interpreter.

    Raises BackendError where the graphs give what is not finite, and what `watch` raises.
    """
    spec = manifest.model
    scales, done = spec.scales, 0

    def announce(title: str) -> None:
        nonlocal done
        if progress and title not in (names.CONDITION, names.UNCONDITIONAL):
            progress(f"{precision}/{title}", done / (scales + 1))
            done += 1

    streams = numbered(seed, first, manifest.batch)
    noise = []
    if manifest.more_smooth:
        codes = manifest.code_model("a mix of codes").tokenizer.vocab_size
        noise = [gumbel(*stream, spec.total_tokens, codes) for stream in streams]
    backend = (open_backend or TorchBackend)(watch, announce)
    # Other backends open every graph before the first launch, and `step` is one session instead of
    # K. The interpreter reads a graph at each launch, and static graphs are simpler.
    graphs = manifest.graphs[precision]
    static = names.scale_graph(0) in graphs and not (open_backend and names.STEP in graphs)
    # graphs are read by path: hashing the weights would take longer than using them
    files = BundleFiles(bundle, manifest, precision, hashes=False)
    try:
        loop = ScaleLoop(files, manifest, backend, precision, "per-scale" if static else "shared")
        try:
            image = loop.run(
                conditions,
                stack_uniforms(streams, spec.draws),
                manifest.defaults,
                forced=forced or (),
                noise=noise,
            )
            return Generation(tokens=backend.choices, image=image.copy())
        finally:
            loop.close()
    finally:
        files.close()


def study_conditions(manifest: Manifest, first: int) -> Conditions:
    """Return the conditions of the images `first` … of a study: labels that are spread over the
    classes, or features drawn in the place of prompts."""
    spec, batch = manifest.model, manifest.batch
    if isinstance(spec, TextModelSpec):
        return drawn_prompts(spec.transformer, numbered(0, first, batch))
    return spread_labels(spec.transformer.classes, batch, first)


def title_of(graph: GraphFile, inputs: Mapping[str, NDArray[Any]]) -> str:
    """Return a graph's name, and for `step` the scale as well, which is one of its inputs."""
    step = graph.ref.kind == "step"
    return f"{graph.ref.name} @ {int(inputs[names.SCALE])}" if step else graph.ref.name


class TorchBackend(HostMemory):
    """Backend that interprets graphs with PyTorch; each is loaded only while it runs.

    Args:
        watch: returns a callback for the values of a graph, given its title: the name, and for
            `step` the scale as well.
        announce: called with the title before each launch.

    Attributes:
        choices: tokens that each scale sampled, [B, L_k], before forced tokens replaced them.
    """

    name = "pytorch"

    def __init__(
        self, watch: Watch | None = None, announce: Callable[[str], None] = lambda title: None
    ) -> None:
        self.watch, self.announce = watch, announce
        self.choices: list[NDArray[np.int64]] = []

    def open(self, graph: GraphFile) -> _TorchSession:
        graph.read()  # which checks the file
        return _TorchSession(graph, self)

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        return launches

    def describe(self) -> dict[str, str]:
        return {"backend": self.name, "torch": torch.__version__}

    def close(self) -> None:
        """Do nothing: the backend holds no resources."""


class _TorchSession:
    """A graph that `TorchBackend` has opened; it is read and interpreted at each launch."""

    def __init__(self, graph: GraphFile, backend: TorchBackend) -> None:
        self._graph, self._backend = graph, backend

    def bind(self, inputs: Arrays, outputs: Arrays) -> Launch:
        feeds = {name: host_view(array) for name, array in inputs.items()}
        results = {name: host_view(array) for name, array in outputs.items()}
        return lambda: self._run(feeds, results)

    def _run(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        backend, title = self._backend, title_of(self._graph, inputs)
        backend.announce(title)
        graph = TorchGraph(self._graph.path)
        drawn = [graph.maker(names.TOKENS).input[2]] if names.TOKENS in outputs else []
        on_value = backend.watch(title) if backend.watch else None
        found = graph.run(inputs, also=drawn, on_value=on_value)
        for name, place in outputs.items():
            place[...] = found[name]
        backend.choices += [found[name] for name in drawn]

    def close(self) -> None:
        pass
