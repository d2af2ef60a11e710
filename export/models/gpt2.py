"""The unconditional GPT-2 form of VAR, as the library call `Edifice.Generative.VAR` describes it.

A GPT-2 style decoder (pre-LN blocks, affine LayerNorm, tanh GELU) over the tokens of a multi-scale
tokenizer with one codebook a scale. It keeps embeddings of its own: the tokens of scale k, embedded
and resized to the next map, are the input of scale k+1. `Gpt2Transformer` is driven exactly as
`Transformer` is; `build`, `build_tokenizer` and what follows them are the library call.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.errors import UsageError
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import (
    Cache,
    FeedForward,
    Modulation,
    NextScaleTransformer,
)
from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

SCALES = (1, 2, 4, 8, 16)
BASE_WIDTH = 32  # of the tokenizer's autoencoder
INIT_STD = 0.02  # GPT-2's


class Gpt2Attention(nn.Module):
    def __init__(self, spec: TransformerSpec, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale, self.dropout = spec.heads, spec.attention_scale, dropout
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.proj = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        g, length, c = x.shape
        qkv = self.qkv(x).view(g, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [G, H, L, D]
        if cache is not None:
            k_all, v_all = cache.extend(layer, k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3))
            k, v = k_all.permute(1, 2, 0, 3), v_all.permute(1, 2, 0, 3)
        dropped = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropped, scale=self.scale
        )
        out: Tensor = self.proj(h.transpose(1, 2).reshape(g, length, c))
        return out


class Gpt2Block(nn.Module):
    def __init__(self, spec: TransformerSpec, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.attn = Gpt2Attention(spec, dropout)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.ffn = FeedForward(spec.width, spec.ffn_width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), mask, cache, layer))
        out: Tensor = x + self.drop(self.ffn(self.norm2(x)))
        return out


class Gpt2Transformer(NextScaleTransformer):
    """Embedded maps of earlier scales → logits over V codes; the interface of `Transformer`.

    Labels tell nothing but the number of rows. Dropout (embeddings, attention, both branches of
    a block) acts in training mode alone. Raises UsageError for sizes that are not of this form.
    """

    lvl_1L: Tensor

    def __init__(self, spec: ModelSpec, dropout: float = 0.0) -> None:
        super().__init__()
        t, vocab = spec.transformer, spec.tokenizer.vocab_size
        if t.family != "gpt2" or t.qk_l2_norm or t.shared_adaln or t.classes:
            raise UsageError(
                "the GPT-2 form needs family gpt2 with 0 classes, no qk_l2_norm and no "
                f"shared_adaln, found {t}"
            )
        if spec.scales < 2:
            raise UsageError(f"next-scale prediction needs two scales, found {spec.patch_nums}")
        self.spec = spec
        self.dropout = _real("dropout", dropout, 0.0, below=1.0)
        self.start = nn.Parameter(torch.zeros(1, 1, t.width))
        self.positions = nn.Parameter(torch.zeros(1, spec.total_tokens, t.width))
        self.levels = nn.Embedding(spec.scales, t.width)
        self.token_embed = nn.ModuleList(
            nn.Embedding(vocab, t.width) for _ in range(spec.scales - 1)
        )
        self.drop = nn.Dropout(self.dropout)
        self.blocks = nn.ModuleList(Gpt2Block(t, self.dropout) for _ in range(t.depth))
        self.norm_out = nn.LayerNorm(t.width, eps=t.norm_eps)
        self.head = nn.Linear(t.width, vocab)
        # kept in the state dict under VAR's key: nothing else in it tells the side lengths
        levels = torch.repeat_interleave(
            torch.arange(spec.scales),
            torch.tensor(spec.scale_lengths),
            output_size=spec.total_tokens,
        )
        self.register_buffer("lvl_1L", levels.view(1, -1))
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2: normal weights, and branches scaled so that the residual stream does not grow."""
        for name, parameter in self.named_parameters():
            if name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * len(self.blocks)))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=INIT_STD)

    def modulation(self, labels_G: Tensor) -> Modulation:
        """The learned start for as many rows as labels; the rest is empty: nothing modulates."""
        nothing = self.start.new_empty(0)
        return Modulation(
            blocks=[nothing] * len(self.blocks), head=nothing, first=self._first(len(labels_G))
        )

    def _first(self, rows: int) -> Tensor:
        """Input of scale 0 [G, 1, C]."""
        first = self.start + self.positions[:, :1] + self.levels.weight[0]
        return first.expand(rows, -1, -1)

    def next_input(self, scale: int, tokens_BL: Tensor) -> Tensor:
        """Tokens of a scale → input of the next one [B, L_{k+1}, C]; the last scale has none."""
        side, target = self.spec.patch_nums[scale], self.spec.patch_nums[scale + 1]
        embedded: Tensor = self.token_embed[scale](tokens_BL)
        maps = embedded.transpose(1, 2).reshape(len(tokens_BL), -1, side, side)
        maps = F.interpolate(maps, size=(target, target), mode="bicubic", align_corners=False)
        return maps.flatten(2).transpose(1, 2)

    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """Inputs of scales 1..K-1 [B, T - 1, C] when the tokens of all K scales are given."""
        return torch.cat([self.next_input(k, t) for k, t in enumerate(tokens[:-1])], dim=1)

    def embed(self, input_BLC: Tensor, start: int) -> Tensor:
        """Inputs of tokens start… → hidden states, both [B, L, C]."""
        stop = start + input_BLC.shape[1]
        place = self.positions[:, start:stop] + self.levels(self.lvl_1L[:, start:stop])
        out: Tensor = input_BLC + place
        return out

    def _run(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = self.drop(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        out: Tensor = self.head(self.norm_out(x))
        return out

    def forward(self, labels_B: Tensor | None, teacher_BLC: Tensor) -> Tensor:
        """Logits [B, T, V] given the inputs of scales 1..K-1 [B, T - 1, C] (see teacher_input).

        The inputs of the first few scales alone give these scales' logits. Labels are ignored.
        """
        x = torch.cat((self._first(len(teacher_BLC)), self.embed(teacher_BLC, 1)), dim=1)
        levels = self.lvl_1L[0, : x.shape[1]]
        return self._run(x, levels[:, None] >= levels[None, :], None)

    def step(self, scale: int, input_BLC: Tensor | None, mod: Modulation, cache: Cache) -> Tensor:
        """Logits [G, L_k, V] of one scale (input None at scale 0); extends the cache."""
        if input_BLC is None:
            x = mod.first
        else:
            x = self.embed(input_BLC, self.spec.prefix_lengths[scale])
            x = x.repeat(len(mod.first) // len(x), 1, 1)
        return self._run(x, None, cache)


def build(
    hidden_size: int = 512,
    num_layers: int = 12,
    num_heads: int = 8,
    mlp_ratio: float = 4.0,
    scales: Sequence[int] = SCALES,
    codebook_size: int = 1024,
    dropout: float = 0.1,
) -> Gpt2Transformer:
    """The next-scale transformer, freshly initialised, in evaluation mode (`.train()` to train).

    Its spec names the tokenizer that `build_tokenizer` makes by default for these scales and codes.
    Raises UsageError for options that make no model.
    """
    width = _whole("hidden_size", hidden_size)
    ratio = _real("mlp_ratio", mlp_ratio, 1 / width)
    spec = ModelSpec(
        tokenizer=_tokenizer_spec(scales, codebook_size),
        transformer=TransformerSpec(
            family="gpt2",
            depth=_whole("num_layers", num_layers),
            width=width,
            heads=_whole("num_heads", num_heads),
            classes=0,
            ffn_width=int(width * ratio),
            qk_l2_norm=False,
        ),
    )
    return Gpt2Transformer(spec, dropout).eval()


def recommended_defaults() -> dict[str, Any]:
    """The options of `build` with their defaults: `build(**recommended_defaults())`."""
    options = inspect.signature(build).parameters
    return {name: option.default for name, option in options.items()}


def total_tokens(scales: Sequence[int] = SCALES) -> int:
    """T, the tokens of an image over all scales. Raises UsageError for sides that do not grow."""
    return sum(side * side for side in _sides(scales))


class ImageEncoder(nn.Module):
    """Images [B, H, W, C] in [0, 1] → a list of one token map a scale, each [B, p_k, p_k] int64.

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
    """One token map a scale, each [B, p_k, p_k] or [B, L_k] → images [B, H, W, C] in [0, 1].

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
    """(encoder, decoder): images [B, H, W, C] in [0, 1] to one token map a scale, and back.

    Both share one freshly initialised `.tokenizer` with a codebook a scale, in evaluation mode.
    `image_size` is the last scale's side times a power of two; UsageError otherwise.
    """
    side = _sides(scales)[-1]
    factor, rest = divmod(_whole("image_size", image_size), side)
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
    """Logits [B, L_k, V] of scale `scale_index` (from 0) given all scales before it.

    Args:
        model: what `build` returned; in training mode dropout applies.
        tokens_of_scales_1_to_k: `scale_index` integer arrays, coarse to fine, each [B, L] or
            [B, p, p]. For scale 0 the list is empty, and B is 1.
        scale_index: which scale to predict.

    Raises UsageError for arrays of another number, shape, type or range.
    """
    spec = model.spec
    scale = _whole("scale_index", scale_index, 0)
    if scale >= spec.scales:
        raise UsageError(f"scale_index must lie between 0 and {spec.scales - 1}, found {scale}")
    device = model.start.device
    given = _flat_tokens(tokens_of_scales_1_to_k, spec.tokenizer, scale, device)
    inputs = [model.next_input(k, t) for k, t in enumerate(given)]
    teacher = torch.cat(inputs, 1) if inputs else model.start.new_empty(1, 0, model.start.shape[2])
    logits: Tensor = model(None, teacher)
    return logits[:, spec.prefix_lengths[scale] :]


def _flat_tokens(
    arrays: Sequence[Any], spec: TokenizerSpec, count: int, device: torch.device
) -> list[Tensor]:
    """Token arrays of the first `count` scales, [B, L] or [B, p, p] → [B, L_k] int64 each."""
    if len(arrays) != count:
        raise UsageError(f"expected {count} token arrays, one a scale, found {len(arrays)}")
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
        raise UsageError(f"tokens of scale {scale} are no array of integers") from None


def _tokenizer_spec(
    scales: Sequence[int],
    codebook_size: int,
    embed_dim: int = 256,
    in_channels: int = 3,
    halvings: int = 4,
) -> TokenizerSpec:
    return TokenizerSpec(
        patch_nums=_sides(scales),
        vocab_size=_whole("codebook_size", codebook_size),
        code_width=_whole("embed_dim", embed_dim),
        base_width=BASE_WIDTH,
        width_multipliers=tuple(2 ** (i // 2) for i in range(halvings + 1)),  # 1, 1, 2, 2, 4
        shared_phi=0,
        phi_ratio=0.0,
        codebook_per_scale=True,
        image_channels=_whole("in_channels", in_channels),
    )


def _sides(scales: Sequence[int]) -> tuple[int, ...]:
    try:
        sides = tuple(_whole("a scale", side) for side in scales)
    except TypeError:
        raise UsageError(f"scales must be a list of whole numbers, found {scales!r}") from None
    if not sides or sides[0] != 1 or any(a >= b for a, b in pairwise(sides)):
        raise UsageError(f"scales must grow from 1, found {sides}")
    return sides


def _whole(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, found {value!r}")
    return int(value)


def _real(name: str, value: object, least: float, below: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} must be a number, found {value!r}")
    if not least <= float(value) < below:
        bound = "" if math.isinf(below) else f" and below {below:g}"
        raise UsageError(f"{name} must be at least {least:g}{bound}, found {value}")
    return float(value)
