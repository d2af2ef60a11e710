"""The sizes of a model, from which every shape in a bundle follows.

Notation (the whole project uses it): B images in a batch, G = 2B rows with guidance and B without,
K scales of side lengths `patch_nums`, L_k = patch_nums[k]², P_k the tokens before scale k, T their
sum, V codes, Cv code width, C model width, H heads, D = C / H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from var_deploy.errors import UsageError
from var_deploy.families import FAMILIES, family_of


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """Sizes of a multi-scale VQVAE.

    Attributes:
        patch_nums: side length of each scale's token map, growing to the latent side.
        vocab_size: number of codes V of a codebook.
        code_width: width Cv of a code.
        base_width: channels `ch` of the first level.
        width_multipliers: one factor a level; each level but the last halves the image.
        res_blocks: residual blocks a level in the encoder; the decoder has one more.
        shared_phi: 0 = one φ per scale, 1 = one for all, n = n of them shared by nearest tick.
        phi_ratio: r of φ(h) = (1-r)·h + r·conv(h); 0 leaves φ out.
        codebook_per_scale: each scale has a codebook of its own (GPT-2 form).
        image_channels: channels of the image.
    """

    patch_nums: tuple[int, ...]
    vocab_size: int
    code_width: int
    base_width: int
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    shared_phi: int = 4
    phi_ratio: float = 0.5
    codebook_per_scale: bool = False
    image_channels: int = 3

    def __post_init__(self) -> None:
        sides = self.patch_nums
        if not sides or sides[0] != 1 or list(sides) != sorted(set(sides)):
            raise UsageError(f"patch_nums must grow from 1, found {sides}")
        for name in ("vocab_size", "code_width", "base_width", "res_blocks", "image_channels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.base_width % 32:
            raise UsageError(
                f"base_width must be a multiple of 32 (GroupNorm has 32 groups), "
                f"found {self.base_width}"
            )

    @property
    def downsample(self) -> int:
        """Image side over latent side."""
        return int(2 ** (len(self.width_multipliers) - 1))

    @property
    def latent_side(self) -> int:
        """Side of f_hat, p_K."""
        return self.patch_nums[-1]

    @property
    def image_side(self) -> int:
        """Side of the (square) image in pixels."""
        return self.downsample * self.latent_side

    @property
    def phi_count(self) -> int:
        """How many φ convolutions the quantizer holds."""
        if self.phi_ratio == 0:
            return 0
        return self.shared_phi or len(self.patch_nums)

    def phi_index(self, scale: int) -> int:
        """Index of the φ that serves `scale`: the one whose tick is nearest to scale/(K-1).

        Ticks lie symmetric, so exact ties are common (scales 2 and 7 of the released models). The
        published code settles them by the rounding of these very float64 expressions; a checkpoint
        was trained with that choice, so it is repeated here to the last bit.
        """
        count, last = self.phi_count, len(self.patch_nums) - 1
        if count <= 1 or last == 0 or self.shared_phi == 1:
            return 0
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(margin, 1 - margin, count)
        return int(np.argmin(np.abs(ticks - scale / last)))


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """Sizes of the next-scale transformer.

    Attributes:
        family: a name of `families.FAMILIES`: "var" (AdaLN, class-conditional) or "gpt2" (affine
            LayerNorm, unconditional).
        depth: number of blocks N.
        width: C.
        heads: H; must divide the width.
        classes: number of classes; label `classes` stands for "no class". 0 for "gpt2".
        ffn_width: inner width of the feed-forward part.
        shared_adaln: one AdaLN projection for all blocks, with a learned offset per block.
        qk_l2_norm: attention on L2-normalised queries and keys.
        norm_eps: eps of every LayerNorm.
    """

    family: str = "var"
    depth: int
    width: int
    heads: int
    classes: int
    ffn_width: int
    shared_adaln: bool = False
    qk_l2_norm: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UsageError(f"family must be one of {known}, found {self.family!r}")
        for name in ("depth", "width", "heads", "ffn_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.width % self.heads:
            raise UsageError(f"width {self.width} is not divisible by {self.heads} heads")

    @property
    def head_width(self) -> int:
        """D, the width of one attention head."""
        return self.width // self.heads

    @property
    def attention_scale(self) -> float:
        """Factor on q·k before the softmax."""
        return family_of(self).attention_scale(self)

    @property
    def conditional(self) -> bool:
        """Whether the model takes a class label (and can be guided)."""
        return family_of(self).conditional


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A tokenizer and the transformer that predicts its tokens."""

    tokenizer: TokenizerSpec
    transformer: TransformerSpec

    def __post_init__(self) -> None:
        if self.scales < family_of(self.transformer).least_scales:
            raise UsageError(f"next-scale prediction needs two scales, found {self.patch_nums}")

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return self.tokenizer.patch_nums

    @property
    def scales(self) -> int:
        """K, the number of scales."""
        return len(self.patch_nums)

    @property
    def scale_lengths(self) -> tuple[int, ...]:
        """L_k for every scale."""
        return tuple(side * side for side in self.patch_nums)

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        """P_k for every scale, and T at the end (K + 1 numbers)."""
        return (0, *accumulate(self.scale_lengths))

    @property
    def total_tokens(self) -> int:
        """T, the number of tokens of an image over all scales."""
        return self.prefix_lengths[-1]

    @property
    def input_width(self) -> int:
        """Width of the next-scale input: Cv, or C where the transformer embeds tokens itself."""
        return family_of(self.transformer).input_width(self)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Build the spec from the values of `to_json`.

        Raises UsageError where a field is missing, unknown or out of range.
        """
        try:
            tokenizer = dict(data["tokenizer"])
            for field in ("patch_nums", "width_multipliers"):
                tokenizer[field] = tuple(int(n) for n in tokenizer[field])
            return cls(
                tokenizer=TokenizerSpec(**tokenizer),
                transformer=TransformerSpec(**data["transformer"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a model description: {error}") from error
