"""VAR in graphs: `condition` computes the AdaLN table, the next input is resized from f_hat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.families.base import BlockContext, ExportFamily, HasKey, SizeOf
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.export.graphs.condition import build_condition
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import NextScaleTransformer, Transformer
from var_deploy.spec import ModelSpec, TokenizerSpec


class _Var(ExportFamily):
    """The VAR family on the build machine."""
    name: ClassVar[str] = "var"
    marks: ClassVar[tuple[str, ...]] = (
        *("pos_1LC", "pos_start", "lvl_embed.weight", "word_embed.weight"),
    )
    start_key: ClassVar[str] = "pos_start"
    heads_key: ClassVar[str] = "blocks.0.attn.scale_mul_1H11"
    usual_head_width: ClassVar[int | None] = 64  # head width of every released VAR
    positions_key: ClassVar[str] = "pos_1LC"
    levels_key: ClassVar[str] = "lvl_embed.weight"
    published_loop: ClassVar[bool] = True

    def own_sizes(self, has: HasKey, size: SizeOf) -> dict[str, Any]:
        return {
            "classes": size("class_emb.weight", 0) - 1,  # the last row stands for "no class"
            "shared_adaln": has("shared_ada_lin.1.weight"),
            "qk_l2_norm": has(self.heads_key),
        }

    def input_weights(self, width: int, tokenizer: TokenizerSpec) -> dict[str, tuple[int, ...]]:
        return {"word_embed.weight": (width, tokenizer.code_width)}

    def condition(self, spec: ModelSpec, form: GraphForm) -> GraphBuilder | None:
        return build_condition(spec, form)

    def modulation(self, b: GraphBuilder, spec: ModelSpec, form: GraphForm) -> str | None:
        t = spec.transformer
        return b.input(names.MODULATION, np.float32, (6 * t.depth + 2, form.rows, t.width))

    def first_hidden(self, b: GraphBuilder, spec: ModelSpec, form: GraphForm) -> str:
        shape = (form.rows, 1, spec.transformer.width)
        first = b.input(names.FIRST_INPUT, np.float32, shape)
        return b.transpose(first, 1, 0, 2)

    def embed(self, b: GraphBuilder, spec: ModelSpec, inputs: str) -> str:
        width = spec.transformer.width
        x = b.transpose(inputs, 1, 0, 2)
        # in fp32 in every precision: f_hat is fp32 and the product is tiny
        bias = b.weight("word_embed.bias", (width,))
        key = "word_embed.weight"
        return b.linear(x, key, spec.tokenizer.code_width, width, bias, full=True)

    def norm(self, b: GraphBuilder, ctx: BlockContext, x: str, layer: int, which: int) -> str:
        return _modulated_norm(b, ctx, x, 6 * layer + 2 + which, 6 * layer + 4 + which)

    def head_norm(self, b: GraphBuilder, ctx: BlockContext, x: str) -> str:
        depth = ctx.spec.transformer.depth
        return _modulated_norm(b, ctx, x, 6 * depth, 6 * depth + 1)

    def add_branch(
        self, b: GraphBuilder, ctx: BlockContext, x: str, h: str, layer: int, which: int
    ) -> str:
        h = b.to_float(h)
        return b.op("Add", x, b.op("Mul", h, _row(b, ctx, 6 * layer + which)))

    def qkv_key(self, layer: int) -> str:
        return f"blocks.{layer}.attn.mat_qkv.weight"

    def qkv_bias(self, layer: int) -> Callable[[ReadKey], NDArray[Any]]:
        prefix = f"blocks.{layer}.attn"

        def make(read: ReadKey) -> NDArray[Any]:
            q, v = read(f"{prefix}.q_bias"), read(f"{prefix}.v_bias")
            return np.concatenate([q, np.zeros_like(q), v])  # VAR has none on the keys

        return make

    def next_maps(self, b: GraphBuilder, spec: ModelSpec, row: str | int) -> str | None:
        return None

    def transformer(self, spec: ModelSpec) -> NextScaleTransformer:
        return Transformer(spec)

    def next_input(
        self, transformer: Any, tokenizer: Tokenizer, scale: int, tokens: Tensor, f_hat: Tensor
    ) -> Tensor:
        return tokenizer.quantize.next_input(scale, f_hat)


def _row(b: GraphBuilder, ctx: BlockContext, row: int) -> str:
    assert ctx.modulation is not None  # every VAR graph declares the table
    return b.gather_row(ctx.modulation, row)


def _modulated_norm(b: GraphBuilder, ctx: BlockContext, x: str, scale: int, shift: int) -> str:
    """Return LN(x)·table[scale] + table[shift]; the table holds 1 + scale."""
    t = ctx.spec.transformer
    factor, offset = _row(b, ctx, scale), _row(b, ctx, shift)
    ones = b.constant(np.ones(t.width, np.float32))
    h = b.op("LayerNormalization", x, ones, axis=-1, epsilon=t.norm_eps)
    return b.op("Add", b.op("Mul", h, factor), offset)


VAR = _Var()
