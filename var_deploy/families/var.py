"""VAR (arXiv 2404.02905): class-conditional, AdaLN, inputs resized from f_hat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from var_deploy.families.base import Family
from var_deploy.image.resize import area_matrix

if TYPE_CHECKING:
    from var_deploy.spec import ModelSpec, TransformerSpec


class _Var(Family):
    """The VAR family."""
    name: ClassVar[str] = "var"
    conditional: ClassVar[bool] = True
    mixes_codes: ClassVar[bool] = True
    least_scales: ClassVar[int] = 1

    def attention_scale(self, transformer: TransformerSpec) -> float:
        # L2-normalised heads carry a learned factor of their own; the published 0.25 otherwise
        return 1.0 if transformer.qk_l2_norm else 0.25 * float(transformer.head_width**-0.5)

    def input_width(self, model: ModelSpec) -> int:
        return model.tokenizer.code_width

    def next_source_side(self, model: ModelSpec, scale: int) -> int:
        return model.tokenizer.latent_side

    def next_matrix(self, model: ModelSpec, scale: int, target: int) -> NDArray[Any]:
        return area_matrix(model.tokenizer.latent_side, target)

    def norm_weights(self, transformer: TransformerSpec) -> int:
        return 0

    def first_weights(self, model: ModelSpec) -> int:
        return 0

    def embed_weights(self, model: ModelSpec) -> int:
        return (model.tokenizer.code_width + 1) * model.transformer.width

    def next_tables(self, model: ModelSpec) -> int:
        return 0

    def embed_operations(self, model: ModelSpec, tokens: int) -> int:
        return 2 * tokens * model.tokenizer.code_width * model.transformer.width

    def modulation_rows(self, transformer: TransformerSpec) -> int:
        return 6 * transformer.depth + 2


VAR = _Var()
