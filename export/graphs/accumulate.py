"""The `accumulate` graph: adds the codes of all scales' tokens up to f_hat, without transformer."""

from __future__ import annotations

import numpy as np

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.quantizer import codebook, phi, resize, to_maps
from var_deploy.image.resize import bicubic_matrix
from var_deploy.spec import TokenizerSpec


def build_accumulate(spec: TokenizerSpec, form: GraphForm) -> GraphBuilder:
    """Tokens of every scale, each [B, L_k] → f_hats [K, B, Cv, p_K, p_K], f_hat after each scale.

    Look-ups, resizing and φ are fp32 in every precision, as in the scale graphs.
    """
    b, batch = GraphBuilder(names.ACCUMULATE, form), form.batch
    width, side = spec.code_width, spec.latent_side
    f_hat, sums = "", []
    for scale, patch in enumerate(spec.patch_nums):
        tokens = b.input(names.encoder_tokens(scale), np.int64, (batch, patch * patch))
        with b.scope(f"scale_{scale:02d}"):
            codes = b.op("Gather", codebook(b, spec, scale), tokens, axis=0)  # [B, L, Cv]
            h = to_maps(b, codes, batch, width, patch)
            if patch != side:
                h = resize(b, b.constant(bicubic_matrix(patch, side)), h)
            if spec.phi_count:
                h = phi(b, spec, spec.phi_index(scale), h)
            f_hat = b.op("Add", f_hat, h) if scale else h
            sums.append(b.op("Unsqueeze", f_hat, b.ints(0)))
    b.op("Concat", *sums, axis=0, out=names.F_HATS)
    b.output(names.F_HATS, np.float32, (len(sums), batch, width, side, side))
    return b
