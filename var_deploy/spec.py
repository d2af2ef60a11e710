"""The sizes of a model, from which every shape in a bundle follows.

Notation (the whole project uses it): B images in a batch, G = 2B rows with guidance and B without,
K scales of side lengths `patch_nums`, L_k = patch_nums[k]², P_k the tokens before scale k, T their
sum, V codes, Cv code width, C model width, H heads, D = C / H.

A text-to-image model has token grids of h_k × w_k, so L_k = h_k · w_k, and bits instead of codes: d
of a latent position, e of a token, S text tokens of width Ct.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any, ClassVar

import numpy as np

from var_deploy.errors import UsageError
from var_deploy.families import FAMILIES, family_of

MAX_TOKEN_BITS = 64


Grid = tuple[int, int]  # rows, columns


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
    def grids(self) -> tuple[Grid, ...]:
        """Token grid of every scale."""
        return tuple((side, side) for side in self.patch_nums)

    @property
    def latent_grid(self) -> Grid:
        """Rows and columns of f_hat."""
        return (self.latent_side, self.latent_side)

    @property
    def image_size(self) -> Grid:
        """Height and width of the image in pixels."""
        return (self.image_side, self.image_side)

    @property
    def token_values(self) -> int:
        """How many values a token can have, V."""
        return self.vocab_size

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
class BitTokenizerSpec:
    """Sizes of a multi-scale bitwise tokenizer (Infinity, arXiv 2412.04431, section 3.2).

    Attributes:
        grids: rows and columns of each scale's token grid, growing from 1 × 1.
        bits: d, the bits of a latent position and the channels of f_hat.
        patch: latent positions along each side of a token: 1, or 2 where tokens are patches.
        base_width: channels of the first level.
        width_multipliers: one factor a level; each level but the last halves the image.
        res_blocks: residual blocks a level in the encoder; the decoder has one more.
        image_channels: channels of the image.
    """

    grids: tuple[Grid, ...]
    bits: int
    patch: int = 1
    base_width: int
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    res_blocks: int = 2
    image_channels: int = 3

    def __post_init__(self) -> None:
        sizes = [rows * columns for rows, columns in self.grids]
        grows = all(a <= b and c <= d for (a, c), (b, d) in pairwise(self.grids))
        if not sizes or sizes[0] != 1 or sizes != sorted(set(sizes)) or not grows:
            raise UsageError(f"grids must grow from 1 × 1, found {self.grids}")
        for name in ("bits", "base_width", "res_blocks", "image_channels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.token_bits > MAX_TOKEN_BITS:
            raise UsageError(f"a token has at most {MAX_TOKEN_BITS} bits, found {self.token_bits}")
        if self.patch not in (1, 2):
            raise UsageError(f"patch must be 1 or 2, found {self.patch}")
        for multiplier in self.width_multipliers:
            norm_groups(self.base_width * multiplier)

    @property
    def token_bits(self) -> int:
        """e, the bits of one token."""
        return self.bits * self.patch**2

    @property
    def token_values(self) -> int:
        """How many values each entry of a token can have: those of a bit."""
        return 2

    @property
    def code_width(self) -> int:
        """Channels of f_hat, d."""
        return self.bits

    @property
    def latent_grids(self) -> tuple[Grid, ...]:
        """Grid of latent positions of every scale, `patch` times the token grid."""
        return tuple((self.patch * rows, self.patch * columns) for rows, columns in self.grids)

    @property
    def latent_grid(self) -> Grid:
        """Rows and columns of f_hat."""
        return self.latent_grids[-1]

    @property
    def downsample(self) -> int:
        """Pixels along each side of a latent position."""
        return int(2 ** (len(self.width_multipliers) - 1))

    @property
    def image_size(self) -> Grid:
        """Height and width of the image in pixels."""
        rows, columns = self.latent_grid
        return (self.downsample * rows, self.downsample * columns)


def norm_groups(channels: int) -> int:
    """Return the groups of a bitwise tokenizer's GroupNorm: 32, or 24 where 32 do not divide.

    Raises UsageError where neither divides the channels.
    """
    for groups in (32, 24):
        if channels % groups == 0:
            return groups
    raise UsageError(
        f"a level of {channels} channels has no GroupNorm: expected a multiple of 32 or 24"
    )


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
        """Whether the model takes a class label."""
        return family_of(self).conditional

    @property
    def guidable(self) -> bool:
        """Whether the model can be guided: it has a condition, and was trained without it too."""
        return self.conditional


@dataclass(frozen=True, kw_only=True)
class TextTransformerSpec:
    """Sizes of the text-to-image transformer of Infinity (arXiv 2412.04431).

    Attributes:
        depth: number of blocks N.
        width: C.
        heads: H; must divide the width, and D = C / H must be a multiple of 4 (RoPE in two axes).
        ffn_width: inner width of the feed-forward part.
        text_width: Ct, of the text features.
        text_length: S, text tokens that the graphs take; a longer prompt is truncated.
        pool_heads: heads of the attention that pools the text.
        rope_grid: the last token grid of the list that rules RoPE: positions of every scale are
            those of this grid.
        levels: rows of the level embedding, of which the scales use the first K.
        unconditional_length: rows of the trained text features that stand for "no prompt".
        norm_eps: eps of every norm.
    """

    family: ClassVar[str] = "infinity"
    classes: ClassVar[int] = 0
    conditional: ClassVar[bool] = False  # takes no class label
    guidable: ClassVar[bool] = True
    depth: int
    width: int
    heads: int
    ffn_width: int
    text_width: int
    text_length: int
    pool_heads: int
    rope_grid: Grid
    levels: int = 15
    unconditional_length: int = 512
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            *("depth", "width", "heads", "ffn_width", "text_width", "text_length"),
            *("pool_heads", "levels", "unconditional_length"),
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.width % (4 * self.heads):
            raise UsageError(
                f"width {self.width} must be a multiple of 4 in each of {self.heads} heads"
            )
        if self.width % self.pool_heads:
            raise UsageError(
                f"width {self.width} is not divisible by {self.pool_heads} pooling heads"
            )
        if self.text_length > self.unconditional_length:
            raise UsageError(
                f"text_length must be at most {self.unconditional_length}, the length that the "
                f"model was trained with, found {self.text_length}"
            )

    @property
    def head_width(self) -> int:
        """D, the width of one attention head."""
        return self.width // self.heads


class NextScaleSpec(ABC):
    """The sizes that every model of next-scale prediction has; a base of the two kinds of model.

    Attributes:
        tokenizer, transformer: their sizes.
    """

    tokenizer: TokenizerSpec | BitTokenizerSpec
    transformer: TransformerSpec | TextTransformerSpec

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of every scale's token grid."""
        return self.tokenizer.grids

    @property
    def scales(self) -> int:
        """K, the number of scales."""
        return len(self.grids)

    @property
    def scale_lengths(self) -> tuple[int, ...]:
        """L_k for every scale."""
        return tuple(rows * columns for rows, columns in self.grids)

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        """P_k for every scale, and T at the end (K + 1 numbers)."""
        return (0, *accumulate(self.scale_lengths))

    @property
    def total_tokens(self) -> int:
        """T, the number of tokens of an image over all scales."""
        return self.prefix_lengths[-1]

    @property
    @abstractmethod
    def token_shape(self) -> tuple[int, ...]:
        """Shape of one token: () for a code, [e] for bits. Each entry takes a random number."""

    @property
    def draws(self) -> int:
        """Random numbers that one image takes."""
        return self.total_tokens * prod(self.token_shape)

    @property
    @abstractmethod
    def input_width(self) -> int:
        """Width of the rows that a scale takes as its input."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec(NextScaleSpec):
    """A tokenizer with codebooks and the transformer that predicts its tokens."""

    tokenizer: TokenizerSpec
    transformer: TransformerSpec

    def __post_init__(self) -> None:
        if self.scales < family_of(self.transformer).least_scales:
            raise UsageError(f"next-scale prediction needs two scales, found {self.patch_nums}")

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return self.tokenizer.patch_nums

    @property
    def input_width(self) -> int:
        """Width of the next-scale input: Cv, or C where the transformer embeds tokens itself."""
        return family_of(self.transformer).input_width(self)

    @property
    def token_shape(self) -> tuple[int, ...]:
        return ()

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


@dataclass(frozen=True, kw_only=True)
class TextModelSpec(NextScaleSpec):
    """A bitwise tokenizer and the text-to-image transformer that predicts its bits."""

    tokenizer: BitTokenizerSpec
    transformer: TextTransformerSpec

    def __post_init__(self) -> None:
        if self.scales > self.transformer.levels:
            raise UsageError(
                f"the model has level embeddings for {self.transformer.levels} scales, found "
                f"{self.scales}"
            )

    @property
    def input_width(self) -> int:
        """Width of the next-scale input: e."""
        return self.tokenizer.token_bits

    @property
    def token_shape(self) -> tuple[int, ...]:
        return (self.tokenizer.token_bits,)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["transformer"]["family"] = self.transformer.family
        return data


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec:
    """Sizes of a T5 encoder (v1.1 form: RMS norm, gated GELU, relative position bias).

    Attributes:
        width: Ct, of the features.
        depth, heads, head_width, ffn_width: of its blocks; heads · head_width need not be the
            width.
        vocab_size: rows of the embedding.
        length: S, tokens that the graph takes.
        buckets: rows of the table of relative position biases.
        max_distance: distance from which on all positions share a bucket.
    """

    width: int
    depth: int
    heads: int
    head_width: int
    ffn_width: int
    vocab_size: int
    length: int
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "norm_eps" and getattr(self, field.name) < 1:
                raise UsageError(
                    f"{field.name} must be at least 1, found {getattr(self, field.name)}"
                )
