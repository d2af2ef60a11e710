"""The scale loop: condition once, one launch a scale, decode once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.runtime.buffers import LoopBuffers
from var_deploy.runtime.protocol import Backend, Buffers, Launch, Session
from var_deploy.sampling import Sampling

Layout = Literal["per-scale", "shared"]


class ScaleLoop:
    """Generates batches of exactly B images.

    All buffers are bound when it is made; a generation only fills the small inputs and launches.

    Args:
        layout: "shared" drives all scales through the one `step` graph, which keeps one copy of
            the weights in memory; "per-scale" opens the K static graphs.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, backend: Backend, precision: str, layout: Layout
    ) -> None:
        self._manifest, self._spec = manifest, manifest.model
        self._opened: dict[str, Session] = {}
        scale_graphs = [
            names.STEP if layout == "shared" else names.scale_graph(k)
            for k in range(self._spec.scales)
        ]
        graphs = {
            name: manifest.graph(precision, name)
            for name in dict.fromkeys([names.DECODER, *scale_graphs])
        }
        if self._spec.transformer.conditional:
            graphs[names.CONDITION] = manifest.graph(precision, names.CONDITION)
        self._buffers = buffers = LoopBuffers(
            manifest, np.float16 if precision == "fp16" else np.float32
        )
        try:
            # the decoder first: its weights are reordered while it loads, and that passing second
            # copy should not come on top of everything else
            for name, graph in graphs.items():
                self._opened[name] = backend.open(bundle / graph.file)
            self._condition = self._bind_condition(graphs)
            self._scales = [
                self._bind(graphs, name, buffers.scale_inputs(k), buffers.scale_outputs(k))
                for k, name in enumerate(scale_graphs)
            ]
            self._decode = self._bind(
                graphs,
                names.DECODER,
                {names.F_HAT: buffers.final_f_hat},
                {names.IMAGE: buffers.image},
            )
        except BaseException:
            self.close()
            raise

    def run(
        self,
        labels: Sequence[int],
        uniforms_BT: NDArray[np.float32],
        sampling: Sampling,
        on_step: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Images [B, side, side, channels] in [0, 1] of B labels and their uniforms [B, T].

        `on_step` is called after each scale and after the decoder with the launches done so far.
        The returned array is overwritten by the next run.
        """
        buffers, spec = self._buffers, self._spec
        batch = self._manifest.batch
        buffers.labels[:batch] = labels
        buffers.labels[batch:] = spec.transformer.classes
        buffers.f_hats[0].fill(0)
        prefix = spec.prefix_lengths
        for scale, target in enumerate(buffers.uniforms):
            target[...] = uniforms_BT[:, prefix[scale] : prefix[scale + 1]]
        scalars = buffers.scalars
        scalars[names.TEMPERATURE][...] = sampling.temperature
        scalars[names.TOP_K][...] = sampling.top_k
        scalars[names.TOP_P][...] = sampling.top_p
        if self._condition is not None:
            self._condition()
        for scale, launch in enumerate(self._scales):
            scalars[names.CFG][...] = sampling.guidance(scale, spec.scales)
            launch()
            if on_step:
                on_step(scale + 1)
        self._decode()
        if on_step:
            on_step(spec.scales + 1)
        return buffers.image

    def tokens(self) -> list[NDArray[np.int64]]:
        """Copies of the last run's tokens, [B, L_k] a scale."""
        return [tokens.copy() for tokens in self._buffers.tokens]

    def close(self) -> None:
        """Release every session; safe to call twice."""
        for session in self._opened.values():
            session.close()
        self._opened.clear()

    def _bind_condition(self, graphs: dict[str, GraphInfo]) -> Launch | None:
        if names.CONDITION not in graphs:
            return None
        inputs: dict[str, NDArray[Any]] = {names.LABELS: self._buffers.labels}
        return self._bind(graphs, names.CONDITION, inputs, self._buffers.condition_out)

    def _bind(
        self, graphs: dict[str, GraphInfo], name: str, inputs: Buffers, outputs: Buffers
    ) -> Launch:
        """Bind what the graph names out of what there is."""
        wanted = {t.name: inputs[t.name] for t in graphs[name].inputs}
        given = {t.name for t in graphs[name].outputs}
        return self._opened[name].bind(wanted, {k: v for k, v in outputs.items() if k in given})
