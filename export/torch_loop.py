"""A generation through the interpreter: the graphs of one precision, driven as a runtime would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.export.graph_runner import complete_step
from var_deploy.export.torch_graph import OnValue, TorchGraph
from var_deploy.manifest import Manifest
from var_deploy.sampling import gumbel, uniforms

Arrays = dict[str, NDArray[Any]]
Watch = Callable[[str], OnValue]  # graph name → what sees its values
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the graphs drew, [B, L_k] a scale, and the image [B, side, side, channels]."""

    tokens: list[NDArray[Any]]
    image: NDArray[Any]


def generate(
    bundle: Path,
    manifest: Manifest,
    precision: str,
    labels: Sequence[int],
    *,
    first: int = 0,
    seed: int = 0,
    forced: Sequence[NDArray[Any]] | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> Generation:
    """Generate B images with the bundle's default settings.

    Args:
        labels: B class numbers.
        first: number of the first image of the batch; it decides the uniforms.
        forced: tokens that take the place of the drawn ones, so that every scale starts from the
            same tokens as another generation.
    """
    graphs = _Graphs(bundle, manifest, precision, watch)
    scales = manifest.model.scales
    report = progress or (lambda message, fraction: None)

    def announce(graph: str, done: int) -> None:
        report(f"{precision}/{graph}", done / (scales + 1))

    tokens, f_hat = _draw(graphs, labels, first, seed, forced, announce)
    announce(names.DECODER, scales)  # by now the cache is gone: these activations are the largest
    image = graphs.run(names.DECODER, {names.F_HAT: f_hat})[names.IMAGE]
    return Generation(tokens=tokens, image=image)


@dataclass(frozen=True)
class _Graphs:
    """The graphs of one precision, each loaded for the moment in which it runs."""

    bundle: Path
    manifest: Manifest
    precision: str
    watch: Watch | None

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.graphs[self.precision]

    def load(self, name: str) -> TorchGraph:
        return TorchGraph(self.bundle / self.manifest.graph(self.precision, name).file)

    def run(self, name: str, given: Arrays) -> Arrays:
        return self.load(name).run(given, on_value=self.watched(name))

    def watched(self, title: str) -> OnValue | None:
        return self.watch(title) if self.watch else None


def _draw(
    graphs: _Graphs,
    labels: Sequence[int],
    first: int,
    seed: int,
    forced: Sequence[NDArray[Any]] | None,
    announce: Callable[[str, int], None],
) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """All scales: what was drawn in each, and the last f_hat."""
    manifest = graphs.manifest
    spec, batch = manifest.model, manifest.batch
    draws = np.stack([uniforms(seed, first + i, spec.total_tokens) for i in range(batch)])
    noise: list[NDArray[Any]] = []
    if manifest.more_smooth:
        codes = spec.tokenizer.vocab_size
        noise = [gumbel(seed, first + i, spec.total_tokens, codes) for i in range(batch)]
    state: Arrays = {}
    if names.CONDITION in graphs:
        rows = np.full(manifest.rows, spec.transformer.classes)
        rows[:batch] = labels
        state |= graphs.run(names.CONDITION, {names.LABELS: rows})
    latent = (batch, spec.tokenizer.code_width, *[spec.tokenizer.latent_side] * 2)
    state[names.F_HAT] = np.zeros(latent, np.float32)
    drawn = []
    for k, length in enumerate(spec.scale_lengths):
        start, name = spec.prefix_lengths[k], names.scale_graph(k)
        settings = manifest.defaults.at(k, spec.scales)
        title = name if name in graphs else f"{names.STEP} @ {k}"
        announce(title, k)
        given = {
            **state,
            names.UNIFORMS: draws[:, start : start + length],
            names.CFG: np.array(settings.guidance),
            names.TEMPERATURE: np.array(settings.temperature),
            names.TOP_K: np.array(settings.top_k),
            names.TOP_P: np.array(settings.top_p),
            names.KEEP_MASK: np.full((batch, length), forced is not None),
            names.KEEP_TOKENS: forced[k] if forced else np.zeros((batch, length), np.int64),
        }
        if manifest.more_smooth:
            given[names.NOISE] = np.stack([numbers[start : start + length] for numbers in noise])
        if name not in graphs:
            name = names.STEP
            given = complete_step(manifest, graphs.precision, k, given)
        graph = graphs.load(name)
        choice = graph.maker(names.TOKENS).input[2]  # before forced tokens take its place
        made = graph.run(given, also=[choice], on_value=graphs.watched(title))
        drawn.append(made[choice])
        state[names.F_HAT] = made[names.NEW_F_HAT]
        if k + 1 < spec.scales:
            state[names.INPUT] = made[names.NEXT_INPUT]
            _append_cache(state, made, spec.transformer.depth)
    return drawn, state[names.F_HAT]


def _append_cache(state: Arrays, made: Arrays, depth: int) -> None:
    for layer in range(depth):
        for past, new in (
            (names.past_key(layer), names.new_key(layer)),
            (names.past_value(layer), names.new_value(layer)),
        ):
            state[past] = np.concatenate([state[past], made[new]]) if past in state else made[new]
