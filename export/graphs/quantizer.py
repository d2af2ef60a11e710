"""Tokens to f_hat and to the next scale's input: lookup, resizing by matrices, φ; all in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.export.families import export_family_of
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.image.resize import area_matrix, bicubic_matrix
from var_deploy.spec import ModelSpec, TokenizerSpec


def resize(b: GraphBuilder, matrix: str, maps: str, columns: str | None = None) -> str:
    """Resize maps [..., h, w] by a matrix for the rows and one for the columns, M · X · Nᵀ; the
    same for both where `columns` is left out."""
    return b.op("MatMul", b.op("MatMul", matrix, maps), b.transpose(columns or matrix, 1, 0))


def codebook(b: GraphBuilder, spec: TokenizerSpec, scale: int) -> str:
    """Return the codebook [V, Cv] of a scale."""
    if not spec.codebook_per_scale:
        return b.weight("quantize.embedding.weight", (spec.vocab_size, spec.code_width))
    return b.gather_row(codebooks(b, spec), scale)


def codebooks(b: GraphBuilder, spec: TokenizerSpec) -> str:
    """Return all codebooks of a tokenizer that has one per scale, [K, V, Cv]."""
    scales = len(spec.patch_nums)

    def stack(read: ReadKey) -> NDArray[Any]:
        return np.stack([read(f"quantize.embedding.{k}.weight") for k in range(scales)])

    shape = (scales, spec.vocab_size, spec.code_width)
    return b.weight("quantize.embedding.weights", shape, stack)


def phi_key(spec: TokenizerSpec, index: int) -> str:
    """Return the checkpoint prefix of φ number `index`."""
    if spec.shared_phi == 1:
        return "quantize.quant_resi.qresi"
    if spec.shared_phi == 0:
        return f"quantize.quant_resi.{index}"
    return f"quantize.quant_resi.qresi_ls.{index}"


def phi(b: GraphBuilder, spec: TokenizerSpec, index: int, h: str) -> str:
    """Compute φ(h) = (1-r)·h + r·conv(h)."""
    width, key = spec.code_width, phi_key(spec, index)
    weight = b.weight(f"{key}.weight", (width, width, 3, 3))
    bias = b.weight(f"{key}.bias", (width,))
    conv = b.op("Conv", h, weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return _blend(b, spec, h, conv)


def _blend(b: GraphBuilder, spec: TokenizerSpec, h: str, conv: str) -> str:
    kept = b.op("Mul", h, b.constant(1 - spec.phi_ratio, np.float32))
    return b.op("Add", kept, b.op("Mul", conv, b.constant(spec.phi_ratio, np.float32)))


def to_maps(b: GraphBuilder, codes_BLC: str, batch: int, width: int, side: int) -> str:
    """Reorder token rows to maps: [B, L, C] → [B, C, p, p]."""
    return b.reshape(b.transpose(codes_BLC, 0, 2, 1), batch, width, side, side)


class Mix(NamedTuple):
    """More-smooth sampling: weights [B, L, V] of the codes, except where `keep` [B, L] is True."""

    weights: str
    keep: str


def _look_up(b: GraphBuilder, table: str, tokens: str, mix: Mix | None) -> str:
    """Return the code of each token, or the mix in its place, [B, L, Cv]."""
    codes = b.op("Gather", table, tokens, axis=0)
    if mix is None:
        return codes
    mixed = b.op("MatMul", mix.weights, table)
    return b.op("Where", b.op("Unsqueeze", mix.keep, b.ints(-1)), codes, mixed)


class StaticCodes:
    """Lookup, φ and resizing of one known scale."""

    def __init__(self, b: GraphBuilder, spec: ModelSpec, scale: int) -> None:
        self.b, self.spec, self.scale, self.batch = b, spec, scale, b.form.batch
        self.side = spec.patch_nums[scale]

    def of_scale(self, values: Sequence[float]) -> str:
        """Choose this scale's fp32 number from one per scale."""
        return self.b.constant(values[self.scale], np.float32)

    def add(self, tokens: str, f_hat: str, mix: Mix | None = None) -> None:
        b, t = self.b, self.spec.tokenizer
        with b.scope("quantize"):
            codes = _look_up(b, codebook(b, t, self.scale), tokens, mix)
            h = to_maps(b, codes, self.batch, t.code_width, self.side)
            if self.side != t.latent_side:
                h = resize(b, b.constant(bicubic_matrix(self.side, t.latent_side)), h)
            if t.phi_count:
                h = phi(b, t, t.phi_index(self.scale), h)
            b.op("Add", f_hat, h, out=names.NEW_F_HAT)

    def next_input(self, tokens: str) -> None:
        b, spec = self.b, self.spec
        target = spec.patch_nums[self.scale + 1]
        with b.scope("next_input"):
            table = export_family_of(spec.transformer).next_maps(b, spec, self.scale)
            if table is not None:
                maps = b.op("Gather", table, tokens, axis=0)
                maps = to_maps(b, maps, self.batch, spec.input_width, self.side)
                maps = resize(b, b.constant(bicubic_matrix(self.side, target)), maps)
            else:
                maps = names.NEW_F_HAT
                if target != spec.tokenizer.latent_side:
                    area = area_matrix(spec.tokenizer.latent_side, target)
                    maps = resize(b, b.constant(area), maps)
            flat = b.reshape(maps, self.batch, spec.input_width, target * target)
            b.op("Transpose", flat, perm=[0, 2, 1], out=names.NEXT_INPUT)


class DynamicCodes:
    """Lookup, φ and resizing for a scale known at run time; sizes come from the input matrices."""

    def __init__(self, b: GraphBuilder, spec: ModelSpec, scale: str) -> None:
        self.b, self.spec, self.scale, self.batch = b, spec, scale, b.form.batch

    def _maps(self, codes_BLC: str, width: int) -> str:
        """Reorder [B, L, C] → [B, C, p, p], where p is the width of the up-sampling matrix."""
        b = self.b
        side = b.op("Shape", names.UP_MATRIX, start=1, end=2)
        shape = b.op("Concat", b.ints(self.batch, width), side, side, axis=0)
        return b.op("Reshape", b.transpose(codes_BLC, 0, 2, 1), shape)

    def of_scale(self, values: Sequence[float]) -> str:
        return self.b.op("Gather", self.b.constant(values, np.float32), self.scale, axis=0)

    def add(self, tokens: str, f_hat: str, mix: Mix | None = None) -> None:
        b, t = self.b, self.spec.tokenizer
        with b.scope("quantize"):
            if t.codebook_per_scale:
                table = b.op("Gather", codebooks(b, t), self.scale, axis=0)
            else:
                table = codebook(b, t, 0)
            codes = _look_up(b, table, tokens, mix)
            h = resize(b, names.UP_MATRIX, self._maps(codes, t.code_width))
            if t.phi_count:
                h = self._phi(h)
            b.op("Add", f_hat, h, out=names.NEW_F_HAT)

    def _phi(self, h: str) -> str:
        """Compute every φ (a tiny convolution), then choose that of this scale."""
        b, t = self.b, self.spec.tokenizer
        if t.phi_count == 1:
            return phi(b, t, 0, h)
        width, count = t.code_width, t.phi_count
        weights = [b.weight(f"{phi_key(t, j)}.weight", (width, width, 3, 3)) for j in range(count)]
        biases = [b.weight(f"{phi_key(t, j)}.bias", (width,)) for j in range(count)]
        weight, bias = b.op("Concat", *weights, axis=0), b.op("Concat", *biases, axis=0)
        conv = b.op("Conv", h, weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        conv = b.reshape(conv, self.batch, count, width, t.latent_side, t.latent_side)
        serving = b.constant([t.phi_index(k) for k in range(self.spec.scales)], np.int64)
        index = b.op("Gather", serving, self.scale, axis=0)
        return _blend(b, t, h, b.op("Gather", conv, index, axis=1))

    def next_input(self, tokens: str) -> None:
        b, spec = self.b, self.spec
        with b.scope("next_input"):
            maps = names.NEW_F_HAT
            table = export_family_of(spec.transformer).next_maps(b, spec, self.scale)
            if table is not None:
                maps = self._maps(b.op("Gather", table, tokens, axis=0), spec.input_width)
            flat = b.reshape(resize(b, names.NEXT_MATRIX, maps), self.batch, spec.input_width, -1)
            b.op("Transpose", flat, perm=[0, 2, 1], out=names.NEXT_INPUT)
