"""Builds, trains and deploys a small next-scale model: the GPT-2 form of VAR.

    from var_deploy.export import var as VAR

    model = VAR.build(hidden_size=128, num_layers=4, scales=(1, 2, 4, 8))
    encoder, decoder = VAR.build_tokenizer(image_size=64, scales=(1, 2, 4, 8))
    token_maps = encoder(images)                               # one [B, p, p] per scale
    logits = VAR.next_scale_prediction(model, token_maps[:2], 2)  # [B, 16, codes] of scale 2

The model is unconditional and has its own token embeddings (`models.gpt2`); the tokenizer has one
codebook per scale. `var_deploy.export.export_modules(model, encoder, folder)` makes a bundle of
both; saved with `torch.save(model.state_dict(), file)` they are files for the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from var_deploy.errors import UsageError
from var_deploy.export.models.gpt2 import Gpt2Transformer, real_number, whole_number
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

__all__ = [
    "build",
    "build_tokenizer",
    "next_scale_prediction",
    "recommended_defaults",
    "total_tokens",
]

SCALES = (1, 2, 4, 8, 16)
BASE_WIDTH = 32  # channels and blocks of the tokenizer's autoencoder


def build(
    hidden_size: int = 512,
    num_layers: int = 12,
    num_heads: int = 8,
    mlp_ratio: float = 4.0,
    scales: Sequence[int] = SCALES,
    codebook_size: int = 1024,
    dropout: float = 0.1,
) -> Gpt2Transformer:
    """Build a freshly initialised next-scale transformer, in evaluation mode (`.train()` to train).

    Args:
        hidden_size: width C of the residual stream; a multiple of `num_heads`.
        num_layers: blocks N.
        num_heads: attention heads H.
        mlp_ratio: inner width of the feed-forward part over `hidden_size`, rounded down.
        scales: side length of each scale's token map; they grow from 1, and there are two at least.
        codebook_size: codes V of each scale.
        dropout: share of activations that are dropped in training mode, in [0, 1).

    Calling the module with (None, inputs [B, T - 1, C]) gives the logits [B, T, V] of all scales
    in one pass; `teacher_input` makes the inputs of tokens, `next_scale_prediction` does both for
    one scale. Its spec names the tokenizer that `build_tokenizer` makes by default for these scales
    and codes. Raises UsageError for options that make no model.
    """
    width = whole_number("hidden_size", hidden_size)
    ratio = real_number("mlp_ratio", mlp_ratio, 1 / width)
    spec = ModelSpec(
        tokenizer=_tokenizer_spec(scales, codebook_size),
        transformer=TransformerSpec(
            family="gpt2",
            depth=whole_number("num_layers", num_layers),
            width=width,
            heads=whole_number("num_heads", num_heads),
            classes=0,
            ffn_width=int(width * ratio),
            qk_l2_norm=False,
        ),
    )
    return Gpt2Transformer(spec, dropout).eval()


def recommended_defaults() -> dict[str, Any]:
    """Return the options of `build` with their defaults, for `build(**recommended_defaults())`.

    hidden_size 512, num_layers 12, num_heads 8, mlp_ratio 4.0, scales (1, 2, 4, 8, 16),
    codebook_size 1024, dropout 0.1.
    """
    options = inspect.signature(build).parameters
    return {name: option.default for name, option in options.items()}


def total_tokens(scales: Sequence[int] = SCALES) -> int:
    """Return T, the number of tokens of an image over all scales: 341 for (1, 2, 4, 8, 16).

    Raises UsageError for sides that do not grow from 1.
    """
    return sum(side * side for side in _sides(scales))


class ImageEncoder(nn.Module):
    """Images [B, H, W, C] in [0, 1] → a list of one token map per scale, each [B, p_k, p_k] int64.

    Raises UsageError for images of another size, type or range.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        spec = self.tokenizer.spec
        expected = (spec.image_side, spec.image_side, spec.image_channels)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected or not len(images):
            raise UsageError(
                f"images must be [B, H, W, C] with H, W, C = {expected}, found {list(images.shape)}"
            )
        if not images.is_floating_point():
            raise UsageError(f"images must be floats in [0, 1], found {images.dtype}")
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise UsageError(f"images must lie in [0, 1], found {low:g} to {high:g}")
        tokens = self.tokenizer.encode(images.permute(0, 3, 1, 2) * 2 - 1)
        return [t.view(-1, side, side) for t, side in zip(tokens, spec.patch_nums, strict=True)]


class ImageDecoder(nn.Module):
    """One token map per scale, each [B, p_k, p_k] or [B, L_k] → images [B, H, W, C] in [0, 1].

    Raises UsageError for maps of another number, shape, type or range.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, token_maps: Sequence[Any]) -> Tensor:
        spec = self.tokenizer.spec
        tokens = _flat_tokens(
            token_maps, spec, len(spec.patch_nums), self.tokenizer.quant_conv.weight.device
        )
        image = self.tokenizer.decode(self.tokenizer.accumulate(tokens))
        return (image.permute(0, 2, 3, 1) + 1) / 2


def build_tokenizer(
    image_size: int = 256,
    scales: Sequence[int] = SCALES,
    codebook_size: int = 1024,
    embed_dim: int = 256,
    in_channels: int = 3,
) -> tuple[ImageEncoder, ImageDecoder]:
    """Build (encoder, decoder): images [B, H, W, C] in [0, 1] to one token map per scale, and back.

    Args:
        image_size: height and width H = W; the last scale's side times a power of two.
        scales: side length p of each scale's token map; they grow from 1.
        codebook_size: codes V of each scale.
        embed_dim: width of a code.
        in_channels: channels C of the images.

    The encoder gives a list of int64 maps [B, p, p]; the decoder takes such a list (arrays, or rows
    [B, p * p], as well). Both share one freshly initialised `.tokenizer` with a codebook per scale,
    in evaluation mode. Decoding is differentiable in codes and decoder; encoding is not. Raises
    UsageError for options that make no tokenizer.
    """
    side = _sides(scales)[-1]
    factor, rest = divmod(whole_number("image_size", image_size), side)
    if rest or factor & (factor - 1) or not factor:
        raise UsageError(
            f"image_size must be the last scale's side {side} times a power of two "
            f"({side}, {2 * side}, {4 * side} …), found {image_size}"
        )
    halvings = factor.bit_length() - 1
    spec = _tokenizer_spec(scales, codebook_size, embed_dim, in_channels, halvings)
    tokenizer = Tokenizer(spec)
    return ImageEncoder(tokenizer).eval(), ImageDecoder(tokenizer).eval()


def next_scale_prediction(
    model: Gpt2Transformer, tokens_of_scales_1_to_k: Sequence[Any], scale_index: int
) -> Tensor:
    """Return the logits [B, L_k, V] of scale `scale_index` (from 0), given all earlier scales.

    Args:
        model: what `build` returned; in training mode dropout applies.
        tokens_of_scales_1_to_k: `scale_index` integer arrays, coarse to fine, each [B, L] or
            [B, p, p]. For scale 0 the list is empty, and B is 1.
        scale_index: which scale to predict.

    Raises UsageError for arrays of another number, shape, type or range.
    """
    spec = model.spec
    scale = whole_number("scale_index", scale_index, 0)
    if scale >= spec.scales:
        raise UsageError(f"scale_index must lie between 0 and {spec.scales - 1}, found {scale}")
    device = model.start.device
    tokens = _flat_tokens(tokens_of_scales_1_to_k, spec.tokenizer, scale, device)
    inputs = [model.next_input(k, t) for k, t in enumerate(tokens)]
    teacher = torch.cat(inputs, 1) if inputs else model.start.new_empty(1, 0, model.start.shape[2])
    logits: Tensor = model(None, teacher)
    return logits[:, spec.prefix_lengths[scale] :]


def _flat_tokens(
    arrays: Sequence[Any], spec: TokenizerSpec, count: int, device: torch.device
) -> list[Tensor]:
    """Flatten the tokens of the first `count` scales: [B, L] or [B, p, p] → [B, L_k] int64 each."""
    if len(arrays) != count:
        raise UsageError(f"expected {count} token arrays, one per scale, found {len(arrays)}")
    flat: list[Tensor] = []
    for k, (array, side) in enumerate(zip(arrays, spec.patch_nums, strict=False)):
        tokens = _as_tensor(array, k)
        if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
            raise UsageError(f"tokens of scale {k} must be integers, found {tokens.dtype}")
        batch = len(flat[0]) if flat else (len(tokens) if tokens.ndim else 0)
        if tuple(tokens.shape) not in ((batch, side * side), (batch, side, side)) or not batch:
            raise UsageError(
                f"tokens of scale {k} must be [{batch or 'B'}, {side * side}] or "
                f"[{batch or 'B'}, {side}, {side}], found {list(tokens.shape)}"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= spec.vocab_size:
            raise UsageError(
                f"tokens of scale {k} must lie between 0 and {spec.vocab_size - 1}, "
                f"found {low} to {high}"
            )
        flat.append(tokens.reshape(batch, -1).to(device, torch.int64))
    return flat


def _as_tensor(array: Any, scale: int) -> Tensor:
    if isinstance(array, Tensor):
        return array
    try:
        return torch.from_numpy(np.array(array))
    except (TypeError, ValueError):
        raise UsageError(f"tokens of scale {scale} are not an array of integers") from None


def _tokenizer_spec(
    scales: Sequence[int],
    codebook_size: int,
    embed_dim: int = 256,
    in_channels: int = 3,
    halvings: int = 4,
) -> TokenizerSpec:
    return TokenizerSpec(
        patch_nums=_sides(scales),
        vocab_size=whole_number("codebook_size", codebook_size),
        code_width=whole_number("embed_dim", embed_dim),
        base_width=BASE_WIDTH,
        width_multipliers=tuple(2 ** (i // 2) for i in range(halvings + 1)),  # 1, 1, 2, 2, 4
        shared_phi=0,
        phi_ratio=0.0,
        codebook_per_scale=True,
        image_channels=whole_number("in_channels", in_channels),
    )


def _sides(scales: Sequence[int]) -> tuple[int, ...]:
    try:
        sides = tuple(whole_number("a scale", side) for side in scales)
    except TypeError:
        raise UsageError(f"scales must be a list of whole numbers, found {scales!r}") from None
    if not sides or sides[0] != 1 or any(a >= b for a, b in pairwise(sides)):
        raise UsageError(f"scales must grow from 1, found {sides}")
    return sides
