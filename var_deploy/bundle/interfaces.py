"""Inputs and outputs of every graph, computed from the sizes of a bundle.

The exporter writes graphs with these, a manifest that lists others is refused, and the buffers of
`runtime/buffers.py` fit them. Sizes as in `var_deploy/names.py`; text stands for an open size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from var_deploy import names
from var_deploy.bundle.graph_refs import bundle_graphs, graph_ref
from var_deploy.spec import ModelSpec, TextModelSpec

Shape = tuple[int | str, ...]
# name, NumPy dtype, shape
Tensor = tuple[str, str, Shape]

FLOAT, HALF, INT, BOOL = "float32", "float16", "int64", "bool"

CacheNames = tuple[Callable[[int], str], Callable[[int], str]]
PAST: CacheNames = (names.past_key, names.past_value)
NEW: CacheNames = (names.new_key, names.new_value)


# An int8 launch takes one image where the buffers of one have more bytes than this. The graphs are
# for CPUs, whose cores one image keeps busy: the time of an image is the same in any batch, and the
# memory of a batch is that of all its images. Where an image is small, a launch spends some of its
# time on operators as such, and a batch shares that.
ALONE_BYTES = 16 << 20


def launch_batch(
    model: ModelSpec | TextModelSpec, precision: str, batch: int, *, guidance: bool
) -> int:
    """Return the images per launch of the graphs of one precision, in a bundle that is exported
    with `batch`: 1 where an int8 image has more than ALONE_BYTES of buffers."""
    if precision != "int8":
        return batch
    one = interfaces_of(model, precision=precision, batch=1, guidance=guidance)
    return 1 if one.buffer_bytes() > ALONE_BYTES else batch


def interfaces_of(
    model: ModelSpec | TextModelSpec,
    *,
    precision: str,
    batch: int,
    guidance: bool,
    more_smooth: bool = False,
) -> Interfaces:
    """Return the interfaces of a bundle of this model."""
    form: dict[str, Any] = {
        "precision": precision,
        "batch": batch,
        "guidance": guidance,
        "more_smooth": more_smooth,
    }
    if isinstance(model, TextModelSpec):
        return TextInterfaces(model=model, **form)
    return CodeInterfaces(model=model, **form)


@dataclass(frozen=True, kw_only=True)
class Interfaces(ABC):
    """Inputs and outputs of the graphs of a bundle, in the exporter's order.

    Args:
        precision: that of the graphs; the cache of fp16 graphs is fp16.
        rows: G.
    """

    model: ModelSpec | TextModelSpec
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
        if graph in (names.CONDITION, names.UNCONDITIONAL):
            return self._condition_inputs(graph)
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
        if graph in (names.CONDITION, names.UNCONDITIONAL):
            return self._condition_outputs()
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
        rows, columns = self.model.tokenizer.latent_grid
        open_sizes = {
            names.LENGTH: self.model.scale_lengths[-1],
            names.NEXT_LENGTH: self.model.scale_lengths[-1],
            names.PAST: self.model.total_tokens,
            names.SIDE: max(rows, columns),
            names.NEXT_SIDE: max(rows, columns),
            names.ROWS: rows,
            names.NEXT_ROW_COUNT: rows,
            names.COLUMNS: columns,
            names.NEXT_COLUMN_COUNT: columns,
        }
        graphs = [g.name for g in bundle_graphs(self.model) if g.kind != "scale"]
        return sum(
            math.prod(open_sizes[n] if isinstance(n, str) else n for n in shape)
            * np.dtype(dtype).itemsize
            for graph in graphs
            for _, dtype, shape in (*self.inputs(graph), *self.outputs(graph))
        )

    # in which the two kinds of model differ

    @abstractmethod
    def _condition_inputs(self, graph: str) -> list[Tensor]: ...

    @abstractmethod
    def _condition_outputs(self) -> list[Tensor]:
        """Return what a condition graph makes."""

    @abstractmethod
    def _conditions(self) -> list[Tensor]:
        """Return what a scale reads of it, the first input first; nothing in a model without."""

    @abstractmethod
    def _step_inputs(self) -> list[Tensor]: ...

    @abstractmethod
    def _settings(self) -> list[Tensor]:
        """Return the scalar inputs of a scale."""

    @property
    def _f_hat(self) -> Shape:
        t = self.model.tokenizer
        return (self.batch, t.code_width, *t.latent_grid)

    @property
    def _image(self) -> Shape:
        t = self.model.tokenizer
        return (self.batch, *t.image_size, t.image_channels)

    def _tokens(self, length: int | str) -> Shape:
        return (self.batch, length, *self.model.token_shape)

    def _every_token(self) -> list[Tensor]:
        return [
            (names.encoder_tokens(k), INT, self._tokens(length))
            for k, length in enumerate(self.model.scale_lengths)
        ]

    def _scale_of(self, graph: str) -> int:
        scale = graph_ref(self.model, self.precision, graph).scale
        if scale is None:
            raise KeyError(graph)
        return scale

    def _scale_inputs(self, scale: int) -> list[Tensor]:
        length, past = self.model.scale_lengths[scale], self.model.prefix_lengths[scale]
        first = self._conditions()
        if scale > 0:
            first = [self._input(length), *first[1:]]
        return [*first, *self._shared_inputs(length, past)]

    def _input(self, length: int | str) -> Tensor:
        return (names.INPUT, FLOAT, (self.batch, length, self.model.input_width))

    def _shared_inputs(self, length: int | str, past: int | str) -> list[Tensor]:
        """Return the inputs that every scale has besides its input and the modulation."""
        tokens = self._tokens(length)
        return [
            *(self._cache(past, PAST) if past else []),
            (names.F_HAT, FLOAT, self._f_hat),
            (names.UNIFORMS, FLOAT, tokens),
            *([(names.CFG, FLOAT, ())] if self.guidance else []),
            *self._settings(),
            (names.KEEP_MASK, BOOL, (self.batch, length)),
            (names.KEEP_TOKENS, INT, tokens),
            *self._noise(length),
        ]

    def _noise(self, length: int | str) -> list[Tensor]:
        return []

    def _scale_outputs(self, length: int | str, following: int | str | None) -> list[Tensor]:
        outputs: list[Tensor] = [
            (names.TOKENS, INT, self._tokens(length)),
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


@dataclass(frozen=True, kw_only=True)
class CodeInterfaces(Interfaces):
    """Of a model whose tokens are codes of a codebook."""

    model: ModelSpec

    def _condition_inputs(self, graph: str) -> list[Tensor]:
        if graph != names.CONDITION:
            raise KeyError(graph)
        return [(names.LABELS, INT, (self.rows,))]

    def _condition_outputs(self) -> list[Tensor]:
        t = self.model.transformer
        return [
            (names.FIRST_INPUT, FLOAT, (self.rows, 1, t.width)),
            (names.MODULATION, FLOAT, (6 * t.depth + 2, self.rows, t.width)),
        ]

    def _conditions(self) -> list[Tensor]:
        return self._condition_outputs() if self.model.transformer.conditional else []

    def _step_inputs(self) -> list[Tensor]:
        side = self.model.tokenizer.latent_side
        conditional = self.model.transformer.conditional
        geometry: list[Tensor] = [
            (names.SCALE, INT, ()),
            (names.UP_MATRIX, FLOAT, (side, names.SIDE)),
            (names.NEXT_MATRIX, FLOAT, (names.NEXT_SIDE, side if conditional else names.SIDE)),
        ]
        shared = self._shared_inputs(names.LENGTH, names.PAST)
        return [*geometry, self._input(names.LENGTH), *self._conditions(), *shared]

    def _settings(self) -> list[Tensor]:
        return [
            (names.TEMPERATURE, FLOAT, ()),
            (names.TOP_K, INT, ()),
            (names.TOP_P, FLOAT, ()),
        ]

    def _noise(self, length: int | str) -> list[Tensor]:
        shape = (self.batch, length, self.model.tokenizer.vocab_size)
        return [(names.NOISE, FLOAT, shape)] if self.more_smooth else []


@dataclass(frozen=True, kw_only=True)
class TextInterfaces(Interfaces):
    """Of a text-to-image model, whose tokens are bits."""

    model: TextModelSpec

    def _condition_inputs(self, graph: str) -> list[Tensor]:
        t = self.model.transformer
        features: list[Tensor] = [
            (names.TEXT_FEATURES, FLOAT, (self.batch, t.text_length, t.text_width))
        ]
        mask = (names.TEXT_MASK, BOOL, (self.batch, t.text_length))
        return [*(features if graph == names.CONDITION else []), mask]

    def _condition_outputs(self) -> list[Tensor]:
        return self._rows(self.batch)

    def _conditions(self) -> list[Tensor]:
        first, modulation, *texts = self._rows(self.rows)
        mask = (names.TEXT_MASK, BOOL, (self.rows, self.model.transformer.text_length))
        return [first, modulation, mask, *texts]

    def _rows(self, rows: int) -> list[Tensor]:
        t = self.model.transformer
        dtype = HALF if self.precision == "fp16" else FLOAT
        texts: list[Tensor] = []
        for layer in range(t.depth):
            key = (rows, t.heads, t.head_width, t.text_length)
            value = (rows, t.heads, t.text_length, t.head_width)
            texts.append((names.text_key(layer), dtype, key))
            texts.append((names.text_value(layer), dtype, value))
        return [
            (names.FIRST_INPUT, FLOAT, (rows, 1, t.width)),
            (names.MODULATION, FLOAT, (rows, 6 * t.depth + 2, t.width)),
            *texts,
        ]

    def _step_inputs(self) -> list[Tensor]:
        (rows, columns), t = self.model.tokenizer.latent_grid, self.model.transformer
        half = (names.LENGTH, t.head_width // 2)
        first, *others = self._conditions()
        return [
            (names.SCALE, INT, ()),
            (names.UP_ROWS, FLOAT, (rows, names.ROWS)),
            (names.UP_COLUMNS, FLOAT, (columns, names.COLUMNS)),
            (names.NEXT_ROWS, FLOAT, (names.NEXT_ROW_COUNT, rows)),
            (names.NEXT_COLUMNS, FLOAT, (names.NEXT_COLUMN_COUNT, columns)),
            (names.ROPE_COS, FLOAT, half),
            (names.ROPE_SIN, FLOAT, half),
            self._input(names.LENGTH),
            first,
            *others,
            *self._shared_inputs(names.LENGTH, names.PAST),
        ]

    def _settings(self) -> list[Tensor]:
        return [(names.TEMPERATURE, FLOAT, ()), (names.TOP_P, FLOAT, ())]
