"""The unconditional GPT-2 form of VAR: the reference module behind `var_deploy.export.var`.

A GPT-2 style decoder (pre-LN blocks, affine LayerNorm, tanh GELU) over the tokens of a multi-scale
tokenizer with one codebook per scale. It has embeddings of its own: the tokens of scale k, embedded
and resized to the next map, are the input of scale k+1. `Gpt2Transformer` is driven exactly as
`Transformer` is.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.errors import UsageError
from var_deploy.export.models.transformer import (
    Cache,
    FeedForward,
    Modulation,
    NextScaleTransformer,
)
from var_deploy.spec import ModelSpec, TransformerSpec

INIT_STD = 0.02  # GPT-2's


class Gpt2Attention(nn.Module):
    """Multi-head attention of a GPT-2 block over [G, L, C]."""
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
    """Pre-LayerNorm block: attention, then feed-forward, each added to the stream."""
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
    """The GPT-2 form: embedded maps of earlier scales → logits over V codes, with the interface of
    `Transformer`.

    Labels only set the number of rows. Dropout (embeddings, attention, both branches of a block)
    acts in training mode only. Raises UsageError for sizes that the GPT-2 form does not have.
    """

    lvl_1L: Tensor
    heads_1H: Tensor

    def __init__(self, spec: ModelSpec, dropout: float = 0.0) -> None:
        super().__init__()
        t, vocab = spec.transformer, spec.tokenizer.vocab_size
        if t.family != "gpt2" or t.qk_l2_norm or t.shared_adaln or t.classes:
            raise UsageError(
                "the GPT-2 form needs family gpt2 with 0 classes, no qk_l2_norm and no "
                f"shared_adaln, found {t}"
            )
        self.spec = spec
        self.dropout = real_number("dropout", dropout, 0.0, below=1.0)
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
        # the shape of this buffer tells the number of heads, as scale_mul_1H11 does in VAR
        self.register_buffer("heads_1H", torch.zeros(1, t.heads))
        self._initialise()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # state dicts that were saved before it was there are loaded with strict=True as well
        state_dict.setdefault(f"{prefix}heads_1H", self.heads_1H)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _initialise(self) -> None:
        """Initialise as GPT-2 does: normal weights, and branches scaled so that the residual stream
        does not grow."""
        for name, parameter in self.named_parameters():
            if name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * len(self.blocks)))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=INIT_STD)

    def modulation(self, labels_G: Tensor) -> Modulation:
        """Return the learned start for as many rows as labels; there is no other modulation."""
        nothing = self.start.new_empty(0)
        return Modulation(
            blocks=[nothing] * len(self.blocks), head=nothing, first=self._first(len(labels_G))
        )

    def _first(self, rows: int) -> Tensor:
        """Return the input of scale 0 [G, 1, C]."""
        first = self.start + self.positions[:, :1] + self.levels.weight[0]
        return first.expand(rows, -1, -1)

    def next_input(self, scale: int, tokens_BL: Tensor) -> Tensor:
        """Tokens of a scale → input of the next scale [B, L_{k+1}, C]; not defined for the last
        scale."""
        side, target = self.spec.patch_nums[scale], self.spec.patch_nums[scale + 1]
        embedded: Tensor = self.token_embed[scale](tokens_BL)
        maps = embedded.transpose(1, 2).reshape(len(tokens_BL), -1, side, side)
        maps = F.interpolate(maps, size=(target, target), mode="bicubic", align_corners=False)
        return maps.flatten(2).transpose(1, 2)

    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return the inputs of scales 1..K-1 [B, T - 1, C], given the tokens of all K scales."""
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


def whole_number(name: str, value: object, least: int = 1) -> int:
    """Return the option `name` as an int. Raises UsageError unless it is a whole number from
    `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, found {value!r}")
    return int(value)


def real_number(name: str, value: object, least: float, below: float = math.inf) -> float:
    """Return the option `name` as a float. Raises UsageError for a number outside [least,
    below)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} must be a number, found {value!r}")
    if not least <= float(value) < below:
        bound = "" if math.isinf(below) else f" and below {below:g}"
        raise UsageError(f"{name} must be at least {least:g}{bound}, found {value}")
    return float(value)
