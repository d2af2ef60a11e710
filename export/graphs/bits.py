"""Bits of tokens to f_hat and to the next scale's input: codes, patches and linear resizing; all in
fp32 (Infinity, arXiv 2412.04431)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.quantizer import resize
from var_deploy.image.resize import linear_matrix
from var_deploy.names import COLUMNS, NEXT_COLUMN_COUNT, NEXT_ROW_COUNT, ROWS
from var_deploy.spec import BitTokenizerSpec, Grid


class BitMaps(Protocol):
    """The operations around the bits in which a static scale graph and `step` differ."""

    def add(self, bits: str, f_hat: str) -> None:
        """Make NEW_F_HAT from bits [B, L, e] and f_hat [B, d, h_K, w_K]."""
        ...

    def next_input(self) -> None:
        """Make NEXT_INPUT [B, L_{k+1}, e] from NEW_F_HAT."""
        ...


def codes(b: GraphBuilder, spec: BitTokenizerSpec, bits: str) -> str:
    """Return the code of each bit, ±1/sqrt(d), of the shape of `bits` (int64)."""
    step = 2 * spec.bits**-0.5
    signed = b.op("Mul", b.cast(bits, np.float32), b.constant(step, np.float32))
    return b.op("Sub", signed, b.constant(step / 2, np.float32))


def to_maps(b: GraphBuilder, spec: BitTokenizerSpec, rows: str, scale: int) -> str:
    """Reorder token rows [B, L, e] of a scale to maps [B, d, h_k, w_k] of latent positions."""
    batch, patch = b.form.batch, spec.patch
    (height, width), (tall, wide) = spec.grids[scale], spec.latent_grids[scale]
    if patch == 1:
        return b.reshape(b.transpose(rows, 0, 2, 1), batch, spec.bits, tall, wide)
    x = b.reshape(rows, batch, height, width, spec.bits, patch, patch)
    return b.reshape(b.transpose(x, 0, 3, 1, 4, 2, 5), batch, spec.bits, tall, wide)


def to_rows(
    b: GraphBuilder, spec: BitTokenizerSpec, maps: str, scale: int, out: str | None = None
) -> str:
    """Reorder maps [B, d, h_k, w_k] of a scale to token rows [B, L, e]; inverse of `to_maps`."""
    batch, patch = b.form.batch, spec.patch
    height, width = spec.grids[scale]
    if patch == 1:
        flat = b.reshape(maps, batch, spec.bits, height * width)
        return b.op("Transpose", flat, perm=[0, 2, 1], out=out)
    x = b.reshape(maps, batch, spec.bits, height, patch, width, patch)
    x = b.transpose(x, 0, 2, 4, 1, 3, 5)
    shape = b.ints(batch, height * width, spec.token_bits)
    return b.op("Reshape", x, shape, out=out)


def resized(
    b: GraphBuilder,
    source: Grid,
    target: Grid,
    maps: str,
    matrix: Callable[[int, int], NDArray[np.float32]] = linear_matrix,
) -> str:
    """Return maps of one grid on another, by constant matrices; unchanged where both are equal."""
    if source == target:
        return maps
    rows, columns = (b.constant(matrix(s, t)) for s, t in zip(source, target, strict=True))
    return resize(b, rows, maps, columns)


class StaticMaps:
    """Codes, patches and resizing of one known scale."""

    def __init__(self, b: GraphBuilder, spec: BitTokenizerSpec, scale: int) -> None:
        self.b, self.spec, self.scale = b, spec, scale

    def add(self, bits: str, f_hat: str) -> None:
        b, spec = self.b, self.spec
        with b.scope("quantize"):
            h = to_maps(b, spec, codes(b, spec, bits), self.scale)
            h = resized(b, spec.latent_grids[self.scale], spec.latent_grid, h)
            b.op("Add", f_hat, h, out=names.NEW_F_HAT)

    def next_input(self) -> None:
        b, spec, following = self.b, self.spec, self.scale + 1
        with b.scope("next_input"):
            grid = spec.latent_grids[following]
            h = resized(b, spec.latent_grid, grid, names.NEW_F_HAT)
            to_rows(b, spec, h, following, out=names.NEXT_INPUT)


class DynamicMaps:
    """Codes, patches and resizing of a scale that is known at run time; declares the resizing
    matrices as inputs, whose shapes tell the grids of this scale and of the next."""

    def __init__(self, b: GraphBuilder, spec: BitTokenizerSpec) -> None:
        self.b, self.spec = b, spec
        tall, wide = spec.latent_grid
        b.input(names.UP_ROWS, np.float32, (tall, ROWS))
        b.input(names.UP_COLUMNS, np.float32, (wide, COLUMNS))
        b.input(names.NEXT_ROWS, np.float32, (NEXT_ROW_COUNT, tall))
        b.input(names.NEXT_COLUMNS, np.float32, (NEXT_COLUMN_COUNT, wide))

    def add(self, bits: str, f_hat: str) -> None:
        b, spec = self.b, self.spec
        with b.scope("quantize"):
            x = codes(b, spec, bits)
            rows, columns = self._size(names.UP_ROWS, 1), self._size(names.UP_COLUMNS, 1)
            batch, bits_ = b.ints(b.form.batch), b.ints(spec.bits)
            shape = b.op("Concat", batch, bits_, rows, columns, axis=0)
            if spec.patch == 1:
                h = b.op("Reshape", b.transpose(x, 0, 2, 1), shape)
            else:
                patch = b.ints(spec.patch)
                height, width = b.op("Div", rows, patch), b.op("Div", columns, patch)
                parts = (batch, height, width, bits_, patch, patch)
                x = b.op("Reshape", x, b.op("Concat", *parts, axis=0))
                h = b.op("Reshape", b.transpose(x, 0, 3, 1, 4, 2, 5), shape)
            h = resize(b, names.UP_ROWS, h, names.UP_COLUMNS)
            b.op("Add", f_hat, h, out=names.NEW_F_HAT)

    def next_input(self) -> None:
        b, spec, batch = self.b, self.spec, self.b.form.batch
        with b.scope("next_input"):
            h = resize(b, names.NEXT_ROWS, names.NEW_F_HAT, names.NEXT_COLUMNS)
            if spec.patch == 1:
                flat = b.reshape(h, batch, spec.bits, -1)
                b.op("Transpose", flat, perm=[0, 2, 1], out=names.NEXT_INPUT)
                return
            patch = b.ints(spec.patch)
            height = b.op("Div", self._size(names.NEXT_ROWS, 0), patch)
            width = b.op("Div", self._size(names.NEXT_COLUMNS, 0), patch)
            parts = (b.ints(batch), b.ints(spec.bits), height, patch, width, patch)
            x = b.op("Reshape", h, b.op("Concat", *parts, axis=0))
            x = b.transpose(x, 0, 2, 4, 1, 3, 5)
            shape = b.ints(batch, -1, spec.token_bits)
            b.op("Reshape", x, shape, out=names.NEXT_INPUT)

    def _size(self, matrix: str, axis: int) -> str:
        return self.b.op("Shape", matrix, start=axis, end=axis + 1)
