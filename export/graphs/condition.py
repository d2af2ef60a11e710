"""The `condition` graph: computes the values that depend on the label alone, once per image.

The AdaLN projections are a third of a block's parameters and read nothing but the label, so they
are not in the scale graphs. Row 6i+j of `modulation` is the j-th of (gamma1, gamma2, 1+scale1,
1+scale2, shift1, shift2) of block i; the last two rows are (1+scale, shift) of the head. The ones
are added here, so that a block spends one product and one sum on a LayerNorm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.spec import ModelSpec


def build_condition(spec: ModelSpec, form: GraphForm) -> GraphBuilder:
    """Build the graph: labels [G] int64 → first_input [G, 1, C], modulation [6N + 2, G, C]."""
    t = spec.transformer
    width, depth = t.width, t.depth
    rows = form.rows
    b = GraphBuilder(names.CONDITION, form)
    labels = b.input(names.LABELS, np.int64, (rows,))
    table = b.weight("class_emb.weight", (t.classes + 1, width))
    cond = b.op("Gather", table, labels, axis=0)  # [G, C]
    first = b.op("Add", cond, b.weight("first_position", (width,), first_position))
    b.op("Reshape", first, b.ints(rows, 1, width), out=names.FIRST_INPUT)

    x = b.to_compute(b.silu(cond))

    def project(prefix: str, parts: int) -> str:
        with b.scope(prefix):
            bias = b.weight(f"{prefix}.bias", (parts * width,), dtype=b.compute)
            y = b.linear(x, f"{prefix}.weight", width, parts * width, bias)
            # [G, parts·C] → [parts, G, C]
            return b.transpose(b.reshape(b.to_float(y), rows, parts, width), 1, 0, 2)

    pieces = []
    if t.shared_adaln:
        shared = project("shared_ada_lin.1", 6)
        for i in range(depth):
            offset = b.weight(f"blocks.{i}.ada_gss", (6, 1, width))
            pieces.append(b.op("Add", shared, offset))
    else:
        pieces = [project(f"blocks.{i}.ada_lin.1", 6) for i in range(depth)]
    pieces.append(project("head_nm.ada_lin.1", 2))
    raw = b.op("Concat", *pieces, axis=0)
    ones = np.array([0, 0, 1, 1, 0, 0] * depth + [1, 0], np.float32).reshape(-1, 1, 1)
    b.op("Add", raw, b.constant(ones), out=names.MODULATION)

    b.output(names.FIRST_INPUT, np.float32, (rows, 1, width))
    b.output(names.MODULATION, np.float32, (6 * depth + 2, rows, width))
    return b


def first_position(read: ReadKey) -> NDArray[Any]:
    """Return the addend of scale 0 to the class embedding: start, position and level."""
    position: NDArray[Any] = (
        read("pos_start")[0, 0] + read("pos_1LC")[0, 0] + read("lvl_embed.weight")[0]
    )
    return position
