"""The GPT-2 form in graphs: affine norms, a learned start, token tables that feed the next
scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from var_deploy.config import GraphForm
from var_deploy.export.families.base import BlockContext, ExportFamily, HasKey, SizeOf
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.export.models.gpt2 import Gpt2Transformer
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import NextScaleTransformer
from var_deploy.spec import ModelSpec, TokenizerSpec


class _Gpt2(ExportFamily):
    """The GPT-2 form of VAR on the build machine."""
    name: ClassVar[str] = "gpt2"
    marks: ClassVar[tuple[str, ...]] = (
        *("positions", "start", "levels.weight", "token_embed.0.weight"),
    )
    start_key: ClassVar[str] = "start"
    heads_key: ClassVar[str] = "heads_1H"
    usual_head_width: ClassVar[int | None] = None  # none is released
    positions_key: ClassVar[str] = "positions"
    levels_key: ClassVar[str] = "levels.weight"
    published_loop: ClassVar[bool] = False

    def own_sizes(self, has: HasKey, size: SizeOf) -> dict[str, Any]:
        return {"classes": 0, "qk_l2_norm": False}

    def input_weights(self, width: int, tokenizer: TokenizerSpec) -> dict[str, tuple[int, ...]]:
        return {"token_embed.0.weight": (tokenizer.vocab_size, width)}

    def condition(self, spec: ModelSpec, form: GraphForm) -> GraphBuilder | None:
        return None

    def modulation(self, b: GraphBuilder, spec: ModelSpec, form: GraphForm) -> str | None:
        return None

    def first_hidden(self, b: GraphBuilder, spec: ModelSpec, form: GraphForm) -> str:
        width = spec.transformer.width
        start = b.weight(
            "first_hidden",
            (1, 1, width),
            lambda read: read("start") + read("positions")[:, :1] + read("levels.weight")[0],
        )
        return b.op("Expand", start, b.ints(1, form.batch, width))

    def embed(self, b: GraphBuilder, spec: ModelSpec, inputs: str) -> str:
        return b.transpose(inputs, 1, 0, 2)  # tokens are embedded before they are resized

    def norm(self, b: GraphBuilder, ctx: BlockContext, x: str, layer: int, which: int) -> str:
        return _affine_norm(b, ctx.spec, x, f"blocks.{layer}.norm{which + 1}")

    def head_norm(self, b: GraphBuilder, ctx: BlockContext, x: str) -> str:
        return _affine_norm(b, ctx.spec, x, "norm_out")

    def add_branch(
        self, b: GraphBuilder, ctx: BlockContext, x: str, h: str, layer: int, which: int
    ) -> str:
        return b.op("Add", x, b.to_float(h))

    def qkv_key(self, layer: int) -> str:
        return f"blocks.{layer}.attn.qkv.weight"

    def qkv_bias(self, layer: int) -> Callable[[ReadKey], NDArray[Any]]:
        return lambda read: read(f"blocks.{layer}.attn.qkv.bias")

    def next_maps(self, b: GraphBuilder, spec: ModelSpec, row: str | int) -> str | None:
        if isinstance(row, int):
            return b.gather_row(_token_tables(b, spec), row)
        # the last scale has no table of its own; what it feeds is never read
        known = b.op("Min", row, b.constant(spec.scales - 2, np.int64))
        return b.op("Gather", _token_tables(b, spec), known, axis=0)

    def transformer(self, spec: ModelSpec) -> NextScaleTransformer:
        return Gpt2Transformer(spec)

    def next_input(
        self, transformer: Any, tokenizer: Tokenizer, scale: int, tokens: Tensor, f_hat: Tensor
    ) -> Tensor:
        following: Tensor = transformer.next_input(scale, tokens)
        return following


def _affine_norm(b: GraphBuilder, spec: ModelSpec, x: str, prefix: str) -> str:
    t = spec.transformer
    weight, bias = (b.weight(f"{prefix}.{part}", (t.width,)) for part in ("weight", "bias"))
    return b.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=t.norm_eps)


def _token_tables(b: GraphBuilder, spec: ModelSpec) -> str:
    """Return the token tables [K - 1, V, C]; the last scale has none, since no scale follows."""

    def stack(read: ReadKey) -> NDArray[Any]:
        return np.stack([read(f"token_embed.{k}.weight") for k in range(spec.scales - 1)])

    shape = (spec.scales - 1, spec.tokenizer.vocab_size, spec.transformer.width)
    return b.weight("token_embed.weights", shape, stack)


GPT2 = _Gpt2()
