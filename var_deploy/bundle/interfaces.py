"""Inputs and outputs of every graph, computed from the sizes of a bundle.

The exporter writes graphs with these, a manifest that lists others is refused, and the buffers of
`runtime/buffers.py` fit them. Sizes as in `var_deploy/names.py`; text stands for an open size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from var_deploy import names
from var_deploy.bundle.graph_refs import bundle_graphs, graph_ref
from var_deploy.spec import ModelSpec

Shape = tuple[int | str, ...]
# name, NumPy dtype, shape
Tensor = tuple[str, str, Shape]

FLOAT, HALF, INT, BOOL = "float32", "float16", "int64", "bool"

CacheNames = tuple[Callable[[int], str], Callable[[int], str]]
PAST: CacheNames = (names.past_key, names.past_value)
NEW: CacheNames = (names.new_key, names.new_value)


@dataclass(frozen=True, kw_only=True)
class Interfaces:
    """Inputs and outputs of the graphs of a bundle, in the exporter's order.

    Args:
        precision: that of the graphs; the cache of fp16 graphs is fp16.
        rows: G.
    """

    model: ModelSpec
    precision: str
    batch: int
    guidance: bool
    more_smooth: bool

    @property
    def rows(self) -> int:
        return 2 * self.batch if self.guidance else self.batch

    def graphs(self) -> list[str]:
        """Names that a graph may have."""
        return [graph.name for graph in bundle_graphs(self.model)]

    def inputs(self, graph: str) -> list[Tensor]:
        """Return the inputs of a graph. Raises KeyError for a name that `graphs` does not list."""
        if graph == names.CONDITION:
            return [(names.LABELS, INT, (self.rows,))]
        if graph == names.DECODER:
            return [(names.F_HAT, FLOAT, self._f_hat)]
        if graph == names.ENCODER:
            return [(names.IMAGE, FLOAT, self._image)]
        if graph == names.ACCUMULATE:
            return self._every_token()
        if graph == names.STEP:
            return self._step_inputs()
        return self._scale_inputs(self._scale_of(graph))

    def outputs(self, graph: str) -> list[Tensor]:
        """Return the outputs of a graph. Raises KeyError for a name that `graphs` does not list."""
        if graph == names.CONDITION:
            return self._conditions()
        if graph == names.DECODER:
            return [(names.IMAGE, FLOAT, self._image)]
        if graph == names.ENCODER:
            return self._every_token()
        if graph == names.ACCUMULATE:
            return [(names.F_HATS, FLOAT, (self.model.scales, *self._f_hat))]
        if graph == names.STEP:
            return self._scale_outputs(names.LENGTH, names.NEXT_LENGTH)
        scale, lengths = self._scale_of(graph), self.model.scale_lengths
        return self._scale_outputs(
            lengths[scale], lengths[scale + 1] if scale + 1 < len(lengths) else None
        )

    def buffer_bytes(self) -> int:
        """Return an upper bound of the bytes of all inputs and outputs of a generation."""
        open_sizes = {
            names.LENGTH: self.model.scale_lengths[-1],
            names.NEXT_LENGTH: self.model.scale_lengths[-1],
            names.PAST: self.model.total_tokens,
            names.SIDE: self.model.patch_nums[-1],
            names.NEXT_SIDE: self.model.patch_nums[-1],
        }
        graphs = [g.name for g in bundle_graphs(self.model) if g.kind != "scale"]
        return sum(
            math.prod(open_sizes[n] if isinstance(n, str) else n for n in shape)
            * np.dtype(dtype).itemsize
            for graph in graphs
            for _, dtype, shape in (*self.inputs(graph), *self.outputs(graph))
        )

    @property
    def _f_hat(self) -> Shape:
        t = self.model.tokenizer
        return (self.batch, t.code_width, t.latent_side, t.latent_side)

    @property
    def _image(self) -> Shape:
        t = self.model.tokenizer
        return (self.batch, t.image_side, t.image_side, t.image_channels)

    def _every_token(self) -> list[Tensor]:
        return [
            (names.encoder_tokens(k), INT, (self.batch, length))
            for k, length in enumerate(self.model.scale_lengths)
        ]

    def _conditions(self) -> list[Tensor]:
        t = self.model.transformer
        return [
            (names.FIRST_INPUT, FLOAT, (self.rows, 1, t.width)),
            (names.MODULATION, FLOAT, (6 * t.depth + 2, self.rows, t.width)),
        ]

    def _scale_of(self, graph: str) -> int:
        scale = graph_ref(self.model, self.precision, graph).scale
        if scale is None:
            raise KeyError(graph)
        return scale

    def _scale_inputs(self, scale: int) -> list[Tensor]:
        length, past = self.model.scale_lengths[scale], self.model.prefix_lengths[scale]
        first = self._conditions() if self.model.transformer.conditional else []
        if scale > 0:
            first = [self._input(length), *first[1:]]
        return [*first, *self._shared_inputs(length, past)]

    def _step_inputs(self) -> list[Tensor]:
        side = self.model.tokenizer.latent_side
        conditional = self.model.transformer.conditional
        geometry: list[Tensor] = [
            (names.SCALE, INT, ()),
            (names.UP_MATRIX, FLOAT, (side, names.SIDE)),
            (names.NEXT_MATRIX, FLOAT, (names.NEXT_SIDE, side if conditional else names.SIDE)),
        ]
        conditions = self._conditions() if conditional else []
        shared = self._shared_inputs(names.LENGTH, names.PAST)
        return [*geometry, self._input(names.LENGTH), *conditions, *shared]

    def _input(self, length: int | str) -> Tensor:
        return (names.INPUT, FLOAT, (self.batch, length, self.model.input_width))

    def _shared_inputs(self, length: int | str, past: int | str) -> list[Tensor]:
        """Return the inputs that every scale has besides its input and the modulation."""
        tokens: Shape = (self.batch, length)
        cache = self._cache(past, PAST) if past else []
        cfg: list[Tensor] = [(names.CFG, FLOAT, ())] if self.guidance else []
        noise: list[Tensor] = []
        if self.more_smooth:
            noise = [(names.NOISE, FLOAT, (*tokens, self.model.tokenizer.vocab_size))]
        return [
            *cache,
            (names.F_HAT, FLOAT, self._f_hat),
            (names.UNIFORMS, FLOAT, tokens),
            *cfg,
            (names.TEMPERATURE, FLOAT, ()),
            (names.TOP_K, INT, ()),
            (names.TOP_P, FLOAT, ()),
            (names.KEEP_MASK, BOOL, tokens),
            (names.KEEP_TOKENS, INT, tokens),
            *noise,
        ]

    def _scale_outputs(self, length: int | str, following: int | str | None) -> list[Tensor]:
        outputs: list[Tensor] = [
            (names.TOKENS, INT, (self.batch, length)),
            (names.NEW_F_HAT, FLOAT, self._f_hat),
        ]
        if following is None:  # the last scale
            return outputs
        next_input = (self.batch, following, self.model.input_width)
        return [*outputs, *self._cache(length, NEW), (names.NEXT_INPUT, FLOAT, next_input)]

    def _cache(self, length: int | str, which: CacheNames) -> list[Tensor]:
        t = self.model.transformer
        dtype = HALF if self.precision == "fp16" else FLOAT
        shape = (length, self.rows, t.heads, t.head_width)
        return [(name(layer), dtype, shape) for layer in range(t.depth) for name in which]
