"""The GPT-2 form: unconditional, affine LayerNorm, token tables of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from var_deploy.families.base import Family
from var_deploy.image.resize import bicubic_matrix

if TYPE_CHECKING:
    from var_deploy.spec import ModelSpec, TransformerSpec


class _Gpt2(Family):
    """The GPT-2 form of VAR."""
    name: ClassVar[str] = "gpt2"
    conditional: ClassVar[bool] = False
    mixes_codes: ClassVar[bool] = False  # the next input is made from tokens, not from f_hat
    # a table embeds each scale's tokens for the next scale: one scale has no table
    least_scales: ClassVar[int] = 2

    def attention_scale(self, transformer: TransformerSpec) -> float:
        return float(transformer.head_width**-0.5)

    def input_width(self, model: ModelSpec) -> int:
        return model.transformer.width  # tokens are embedded before they are resized

    def next_source_side(self, model: ModelSpec, scale: int) -> int:
        return model.patch_nums[scale]

    def next_matrix(self, model: ModelSpec, scale: int, target: int) -> NDArray[Any]:
        return bicubic_matrix(model.patch_nums[scale], target)

    def norm_weights(self, transformer: TransformerSpec) -> int:
        return 2 * transformer.width

    def first_weights(self, model: ModelSpec) -> int:
        return model.transformer.width

    def embed_weights(self, model: ModelSpec) -> int:
        return 0

    def next_tables(self, model: ModelSpec) -> int:
        # the last scale's tokens feed no other
        return (model.scales - 1) * model.tokenizer.vocab_size * model.transformer.width

    def embed_operations(self, model: ModelSpec, tokens: int) -> int:
        return 0

    def modulation_rows(self, transformer: TransformerSpec) -> int:
        return 0


GPT2 = _Gpt2()
