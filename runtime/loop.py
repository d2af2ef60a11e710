"""The scale loop: condition once, one launch a scale, decode once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.errors import BackendError
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.runtime.buffers import LoopBuffers
from var_deploy.runtime.protocol import Arrays, Backend, Launch, Session
from var_deploy.sampling import Sampling

Layout = Literal["per-scale", "shared"]


class ScaleLoop:
    """Generates batches of exactly B images.

    All buffers are bound when it is made; a generation only fills the small inputs and launches.

    Args:
        backend: the loop's own from here on; closed with it, also when this fails.
        layout: "shared" drives all scales through the one `step` graph, which keeps one copy of
            the weights in memory; "per-scale" opens the K static graphs.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, backend: Backend, precision: str, layout: Layout
    ) -> None:
        self._manifest, self._spec, self._backend = manifest, manifest.model, backend
        self._opened: dict[str, Session] = {}
        self._launches: Sequence[Launch] = ()
        try:
            graphs = self._graphs(precision, layout)
            half = precision == "fp16"
            self._buffers = LoopBuffers(manifest, np.float16 if half else np.float32, backend)
            # the decoder first: its weights are reordered while it loads, and that passing second
            # copy should not come on top of everything else
            for name, graph in sorted(graphs.items(), key=lambda item: item[0] != names.DECODER):
                self._opened[name] = backend.open(bundle / graph.file)
            launches = self._bind_all(graphs, layout)
            # a backend may run everything once: with a generation that is as good as any
            draws = np.zeros((manifest.batch, self._spec.total_tokens), np.float32)
            self._buffers.fill([0] * manifest.batch, draws, Sampling())
            self._launches = backend.finish(launches)
        except BaseException:
            self.close()
            raise

    def run(
        self,
        labels: Sequence[int],
        uniforms_BT: NDArray[np.float32],
        sampling: Sampling,
        on_step: Callable[[int], None] | None = None,
        forced: Sequence[NDArray[np.int64]] = (),
    ) -> NDArray[np.float32]:
        """Images [B, side, side, channels] in [0, 1] of B labels and their uniforms [B, T].

        `forced` holds the tokens [B, L_k] of the first scales; the others are drawn.
        `on_step` is called after each scale and after the decoder with how many of them are done;
        on a GPU that makes the host wait at each. The returned array is overwritten by the next
        run. Raises BackendError where the model's logits are not numbers.
        """
        if not self._launches:
            raise BackendError("this scale loop is closed")
        buffers, backend = self._buffers, self._backend
        buffers.fill(labels, uniforms_BT, sampling, forced)
        before = len(self._launches) - self._spec.scales - 1  # `condition`, where there is one
        for number, launch in enumerate(self._launches):
            launch()
            if number == before + self._spec.scales - 1:
                buffers.arena.forget()  # the decoder needs the room, not the cache
            if on_step and number >= before:
                backend.synchronize()
                on_step(number - before + 1)
        buffers.made.download()
        backend.synchronize()
        self._check_tokens()
        return buffers.image()

    def _check_tokens(self) -> None:
        """The graphs give V, which is no code, for logits that are not numbers."""
        for scale in range(self._spec.scales):
            if (self._buffers.tokens(scale) >= self._spec.tokenizer.vocab_size).any():
                raise BackendError(
                    f"the logits of scale {scale} are not numbers: fp16 overflowed, or the weights "
                    "hold such values; try precision fp32, and var-deploy verify names the layer"
                )

    def tokens(self) -> list[NDArray[np.int64]]:
        """Copies of the last run's tokens, [B, L_k] a scale."""
        return [self._buffers.tokens(k).copy() for k in range(self._spec.scales)]

    def close(self) -> None:
        """Release every session and the backend's memory; safe to call twice."""
        for session in self._opened.values():
            session.close()
        self._opened.clear()
        self._launches = ()
        self._backend.close()

    def _graphs(self, precision: str, layout: Layout) -> dict[str, GraphInfo]:
        wanted = [*_scale_graphs(self._spec.scales, layout), names.DECODER]
        if self._spec.transformer.conditional:
            wanted.insert(0, names.CONDITION)
        return {name: self._manifest.graph(precision, name) for name in wanted}

    def _bind_all(self, graphs: Mapping[str, GraphInfo], layout: Layout) -> list[Launch]:
        """Launches in the order of a generation."""
        b, scales = self._buffers, _scale_graphs(self._spec.scales, layout)
        launches = []
        if names.CONDITION in graphs:
            condition = graphs[names.CONDITION]
            launches.append(
                self._bind(condition, names.CONDITION, b.condition_inputs(), b.condition_outputs())
            )
        for k, name in enumerate(scales):
            launches.append(
                self._bind(graphs[name], name, b.scale_inputs(k), b.scale_outputs(k))
            )
        decoder = graphs[names.DECODER]
        launches.append(
            self._bind(decoder, names.DECODER, b.decoder_inputs(), b.decoder_outputs())
        )
        return launches

    def _bind(self, graph: GraphInfo, name: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """Bind what the graph names out of what there is."""
        wanted = {t.name: inputs[t.name] for t in graph.inputs}
        given = {t.name for t in graph.outputs}
        return self._opened[name].bind(wanted, {k: v for k, v in outputs.items() if k in given})


def _scale_graphs(scales: int, layout: Layout) -> list[str]:
    """The graph that computes each scale."""
    return [names.STEP if layout == "shared" else names.scale_graph(k) for k in range(scales)]
