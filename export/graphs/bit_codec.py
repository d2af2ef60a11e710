"""The graphs `decoder`, `encoder` and `accumulate` of a bitwise tokenizer (Infinity, arXiv
2412.04431): an autoencoder of convolutions alone, on maps that need not be square."""

from __future__ import annotations

import numpy as np

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.graphs.bits import codes, resized, to_maps, to_rows
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.codec import Autoencoder
from var_deploy.export.int8.operators import Ranges
from var_deploy.image.resize import area_matrix
from var_deploy.spec import BitTokenizerSpec


def build_bit_decoder(
    spec: BitTokenizerSpec, form: GraphForm, ranges: Ranges | None = None
) -> GraphBuilder:
    """Build the decoder: f_hat [B, d, h_K, w_K] → image [B, height, width, channels] in [0, 1].

    `ranges` names the convolutions that run in int8.
    """
    b, shape = GraphBuilder(names.DECODER, form), (form.batch, spec.bits, *spec.latent_grid)
    layers = Autoencoder(b, spec, attention=False, ranges=ranges)
    layers.decode(b.input(names.F_HAT, np.float32, shape))
    return b


def build_bit_encoder(spec: BitTokenizerSpec, form: GraphForm) -> GraphBuilder:
    """Build the encoder: image [B, height, width, channels] in [0, 1] → bits of every scale
    [B, L_k, e].

    A bit is the sign of the residual that is averaged to the scale's grid.
    """
    b = GraphBuilder(names.ENCODER, form)
    latent = Autoencoder(b, spec, attention=False).encode()
    residual = b.op("Identity", latent, out=names.LATENT)
    last = len(spec.grids) - 1
    for scale, grid in enumerate(spec.latent_grids):
        with b.scope(f"scale_{scale:02d}"):
            z = resized(b, spec.latent_grid, grid, residual, area_matrix)
            positive = b.cast(b.op("Greater", z, b.constant(0.0, np.float32)), np.int64)
            name = names.encoder_tokens(scale)
            bits = to_rows(b, spec, positive, scale, out=name)
            b.output(
                name,
                np.int64,
                (form.batch, spec.grids[scale][0] * spec.grids[scale][1], spec.token_bits),
            )
            if scale != last:
                code = _on_latent_grid(b, spec, bits, scale)
                residual = b.op("Sub", residual, code)
    return b


def build_bit_accumulate(spec: BitTokenizerSpec, form: GraphForm) -> GraphBuilder:
    """Build f_hats [K, B, d, h_K, w_K], f_hat after each scale, of the bits [B, L_k, e] of all."""
    b = GraphBuilder(names.ACCUMULATE, form)
    f_hat, sums = "", []
    for scale, (rows, columns) in enumerate(spec.grids):
        shape = (form.batch, rows * columns, spec.token_bits)
        bits = b.input(names.encoder_tokens(scale), np.int64, shape)
        with b.scope(f"scale_{scale:02d}"):
            h = _on_latent_grid(b, spec, bits, scale)
            f_hat = b.op("Add", f_hat, h) if scale else h
            sums.append(b.op("Unsqueeze", f_hat, b.ints(0)))
    b.op("Concat", *sums, axis=0, out=names.F_HATS)
    b.output(names.F_HATS, np.float32, (len(sums), form.batch, spec.bits, *spec.latent_grid))
    return b


def _on_latent_grid(b: GraphBuilder, spec: BitTokenizerSpec, bits: str, scale: int) -> str:
    """Return what the bits [B, L_k, e] of a scale add to f_hat, [B, d, h_K, w_K]."""
    h = to_maps(b, spec, codes(b, spec, bits), scale)
    return resized(b, spec.latent_grids[scale], spec.latent_grid, h)
