"""The VAR transformer (arXiv 2404.02905): AdaLN blocks, attention causal by scale.

Module and parameter names are the keys of the released state dicts. Three ways through it share
every block: `forward` (teacher-forced, one pass with a mask), `step` (one scale on a cache) and,
behind both, `modulation`, which depends on the label alone and is computed once per image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.spec import ModelSpec

MAX_SCALE_LOG = 4.605170185988092  # ln 100, the cap of the learned query scale


class Cache:
    """Keys and values of the scales done so far, one pair [P, G, H, D] per block."""

    def __init__(self, depth: int) -> None:
        self.pairs: list[tuple[Tensor, Tensor] | None] = [None] * depth

    def extend(self, layer: int, k_LGHD: Tensor, v_LGHD: Tensor) -> tuple[Tensor, Tensor]:
        past = self.pairs[layer]
        if past is not None:
            k_LGHD, v_LGHD = torch.cat((past[0], k_LGHD)), torch.cat((past[1], v_LGHD))
        self.pairs[layer] = (k_LGHD, v_LGHD)
        return k_LGHD, v_LGHD


class SelfAttention(nn.Module):
    """Multi-head attention over [G, L, C], with L2-normalised queries and keys in large models.

    `turn`, where given, is applied to the queries and to the new keys, both [G, H, L, D], after
    normalisation.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, qk_l2_norm: bool) -> None:
        super().__init__()
        self.heads, self.qk_l2_norm = heads, qk_l2_norm
        self.scale = 1.0 if qk_l2_norm else 0.25 * (width // heads) ** -0.5
        if qk_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
        turn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        g, length, c = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(g, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [G, H, L, D]
        if self.qk_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(MAX_SCALE_LOG).exp()
            k = F.normalize(k, dim=-1)
        if turn is not None:
            q, k = turn(q), turn(k)
        if cache is not None:
            k_all, v_all = cache.extend(layer, k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3))
            k, v = k_all.permute(1, 2, 0, 3), v_all.permute(1, 2, 0, 3)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        out: Tensor = self.proj(h.transpose(1, 2).reshape(g, length, c))
        return out


class FeedForward(nn.Module):
    """Two linear layers with tanh GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Transformer block whose LayerNorms and branches are modulated by the label (AdaLN)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        t = spec.transformer
        self.eps = t.norm_eps
        self.attn = SelfAttention(t.width, t.heads, t.qk_l2_norm)
        self.ffn = FeedForward(t.width, t.ffn_width)
        if t.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, t.width) / t.width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(t.width, 6 * t.width))

    def modulation(self, cond_GC: Tensor, shared_G6C: Tensor | None) -> Tensor:
        """Return the modulation [6, G, 1, C]: gamma1, gamma2, scale1, scale2, shift1, shift2."""
        g, c = cond_GC.shape
        if shared_G6C is not None:
            m = self.ada_gss[0] + shared_G6C
        else:
            m = self.ada_lin(cond_GC).view(g, 6, c)
        return m.transpose(0, 1).unsqueeze(2)

    def forward(
        self, x: Tensor, mod: Tensor, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = mod
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale1) + shift1
        x = x + gamma1 * self.attn(h, mask, cache, layer)
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale2) + shift2
        out: Tensor = x + gamma2 * self.ffn(h)
        return out


class HeadNorm(nn.Module):
    """The modulated LayerNorm before the head."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, cond_GC: Tensor) -> Tensor:
        """Return the modulation [2, G, 1, C]: scale, shift."""
        g, c = cond_GC.shape
        out: Tensor = self.ada_lin(cond_GC).view(g, 2, c).transpose(0, 1).unsqueeze(2)
        return out

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + mod[0]) + mod[1]


class Modulation(NamedTuple):
    """The values that depend on the label alone: AdaLN modulation and first input."""

    blocks: list[Tensor]  # N × [6, G, 1, C]
    head: Tensor  # [2, G, 1, C]
    first: Tensor  # input of scale 0, [G, 1, C]


class NextScaleTransformer(nn.Module, ABC):
    """The interface of the reference module of every family, as the scale loop drives it.

    Attributes:
        spec: sizes of the model.
    """

    spec: ModelSpec

    @abstractmethod
    def modulation(self, labels_G: Tensor) -> Modulation:
        """Return the values that depend on the labels of G rows alone; computed once per image."""

    @abstractmethod
    def step(self, scale: int, input_BLC: Tensor | None, mod: Modulation, cache: Cache) -> Tensor:
        """Logits [G, L_k, V] of one scale, whose input is None at scale 0; extends the cache."""


class Transformer(NextScaleTransformer):
    """VAR: labels and the code maps of earlier scales → logits over V codes."""

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        t = spec.transformer
        self.spec = spec
        self.word_embed = nn.Linear(spec.tokenizer.code_width, t.width)
        self.class_emb = nn.Embedding(t.classes + 1, t.width)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, t.width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, spec.total_tokens, t.width))
        self.lvl_embed = nn.Embedding(spec.scales, t.width)
        if t.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(t.width, 6 * t.width))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(t.depth))
        self.head_nm = HeadNorm(t.width, t.norm_eps)
        self.head = nn.Linear(t.width, spec.tokenizer.vocab_size)
        levels = torch.repeat_interleave(
            torch.arange(spec.scales),
            torch.tensor(spec.scale_lengths),
            output_size=spec.total_tokens,
        ).view(1, -1)
        self.register_buffer("lvl_1L", levels)
        allowed = levels.unsqueeze(-1) >= levels.unsqueeze(1)
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        self.register_buffer("attn_bias_for_masking", bias.unsqueeze(1))

    def modulation(self, labels_G: Tensor) -> Modulation:
        cond = self.class_emb(labels_G)
        shared = None
        if self.spec.transformer.shared_adaln:
            shared = self.shared_ada_lin(cond).view(len(labels_G), 6, -1)
        position = self.pos_1LC[:, :1] + self.lvl_embed.weight[0]
        blocks = [cast(Block, block).modulation(cond, shared) for block in self.blocks]
        return Modulation(
            blocks=blocks,
            head=self.head_nm.modulation(cond),
            first=cond.unsqueeze(1) + self.pos_start + position,
        )

    def embed(self, codes_BLC: Tensor, start: int) -> Tensor:
        """Code vectors of tokens start… [B, L, Cv] → hidden states [B, L, C]."""
        stop = start + codes_BLC.shape[1]
        position = self.pos_1LC[:, start:stop] + self.lvl_embed(self.lvl_1L[:, start:stop])
        out: Tensor = self.word_embed(codes_BLC) + position
        return out

    def _run(self, x: Tensor, mod: Modulation, mask: Tensor | None, cache: Cache | None) -> Tensor:
        for layer, (block, m) in enumerate(zip(self.blocks, mod.blocks, strict=True)):
            x = block(x, m, mask, cache, layer)
        out: Tensor = self.head(self.head_nm(x, mod.head))
        return out

    def forward(self, labels_B: Tensor, teacher_BLC: Tensor) -> Tensor:
        """Logits [B, T, V] given the inputs of scales 1..K-1 [B, T - 1, Cv] (no guidance)."""
        mod = self.modulation(labels_B)
        x = torch.cat((mod.first, self.embed(teacher_BLC, 1)), dim=1)
        return self._run(x, mod, self.attn_bias_for_masking, None)

    def step(self, scale: int, input_BLC: Tensor | None, mod: Modulation, cache: Cache) -> Tensor:
        """Logits [G, L_k, V] of one scale; extends the cache.

        `input_BLC` is [B, L_k, Cv] (None at scale 0); with guidance G = 2B and both halves of
        the rows see the same input.
        """
        if input_BLC is None:
            x = mod.first
        else:
            x = self.embed(input_BLC, self.spec.prefix_lengths[scale])
            x = x.repeat(len(mod.first) // len(x), 1, 1)
        return self._run(x, mod, None, cache)
