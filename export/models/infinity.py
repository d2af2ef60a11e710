"""The text-to-image transformer of Infinity (arXiv 2412.04431).

Module and parameter names are the keys of the released state dicts, but for the blocks, which lie
flat under `blocks` (see `checkpoint.infinity_keys`). `condition` computes what depends on the text
alone, once per image; `step` runs one scale on a cache of keys and values, and `forward` all scales
at once, teacher-forced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.export.models.rope import rope_tables
from var_deploy.export.models.transformer import Cache, FeedForward, HeadNorm, SelfAttention
from var_deploy.spec import TextModelSpec, TextTransformerSpec


class RMSNorm(nn.Module):
    """x / rms(x), times a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class CrossAttention(nn.Module):
    """Multi-head attention of hidden states [G, L, C] over the text of their row."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def keys_values(self, text_GSC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of text tokens, each [G, H, S, D]."""
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        k, v = F.linear(text_GSC, self.mat_kv.weight, bias).chunk(2, dim=-1)
        return self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], valid_G11S: Tensor) -> Tensor:
        k, v = text
        h = F.scaled_dot_product_attention(self._heads(self.mat_q(x)), k, v, attn_mask=valid_G11S)
        out: Tensor = self.proj(h.transpose(1, 2).flatten(2))
        return out


class PoolAttention(nn.Module):
    """Attention of one learned query per head over the text: [G, S, Ct] → [G, C]."""

    zero_k_bias: Tensor

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.mat_q = nn.Parameter(torch.zeros(1, heads, width // heads))
        self.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, text_GSC: Tensor, valid_G11S: Tensor) -> Tensor:
        heads = self.mat_q.shape[1]
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        kv = F.linear(text_GSC, self.mat_kv.weight, bias)
        k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in kv.chunk(2, dim=-1))
        q = self.mat_q.unsqueeze(2).expand(len(k), -1, -1, -1)  # [G, Hp, 1, Dp]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=valid_G11S)
        out: Tensor = self.proj(h.flatten(1))
        return out


class TextPool(nn.Module):
    """Holds the pooling attention under the released key `text_proj_for_sos.ca`."""

    def __init__(self, spec: TextTransformerSpec) -> None:
        super().__init__()
        self.ca = PoolAttention(spec.text_width, spec.width, spec.pool_heads)


class TextBlock(nn.Module):
    """Self attention, cross attention over the text, and feed-forward.

    The first and the last are modulated by the pooled text (AdaLN), the second is not.
    """

    def __init__(self, spec: TextTransformerSpec) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, spec.width))
        self.sa = SelfAttention(spec.width, spec.heads, qk_l2_norm=True)
        self.ca = CrossAttention(spec.width, spec.heads)
        self.ca_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.ffn = FeedForward(spec.width, spec.ffn_width)

    def modulation(self, shared_G6C: Tensor) -> Tensor:
        """Return the modulation [6, G, 1, C]: gamma1, gamma2, scale1, scale2, shift1, shift2."""
        return (self.ada_gss[0] + shared_G6C).transpose(0, 1).unsqueeze(2)

    def forward(
        self,
        x: Tensor,
        mod: Tensor,
        text: tuple[Tensor, Tensor],
        valid: Tensor,
        cache: Cache | None,
        layer: int,
        turn: Callable[[Tensor], Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = mod
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale1) + shift1
        x = x + gamma1 * self.sa(h, mask, cache, layer, turn)
        x = x + self.ca(self.ca_norm(x), text, valid)
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale2) + shift2
        out: Tensor = x + gamma2 * self.ffn(h)
        return out


class TextCondition(NamedTuple):
    """The values that depend on the text alone, computed once per image."""

    valid: Tensor  # which text tokens count, bool [G, S]
    normed: Tensor  # text features after the norm [G, S, Ct]
    text: Tensor  # text tokens for cross attention [G, S, C]
    cond: Tensor  # pooled text [G, C]
    shared: Tensor  # modulation before the blocks add their own [G, 6, C]
    blocks: list[Tensor]  # modulation of the blocks, N × [6, G, 1, C]
    head: Tensor  # modulation of the head [2, G, 1, C]
    cross: list[tuple[Tensor, Tensor]]  # keys and values of the text, N × 2 × [G, H, S, D]
    first: Tensor  # input of scale 0 before the level embedding [G, 1, C]


class StepResult(NamedTuple):
    """Results of one scale."""

    hidden: Tensor  # after the last block [G, L_k, C]
    logits: Tensor  # raw: before temperature and guidance [G, L_k, 2e]


class InfinityTransformer(nn.Module):
    """Infinity: text features and the bits of earlier scales → two logits per bit."""

    def __init__(self, spec: TextModelSpec) -> None:
        super().__init__()
        t, token_bits = spec.transformer, spec.tokenizer.token_bits
        self.spec = spec
        self.cfg_uncond = nn.Parameter(torch.zeros(t.unconditional_length, t.text_width))
        self.pos_start = nn.Parameter(torch.zeros(1, 1, t.width))
        self.text_norm = RMSNorm(t.text_width, t.norm_eps)
        self.text_proj_for_sos = TextPool(t)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(t.text_width, t.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(t.width, t.width),
        )
        self.lvl_embed = nn.Embedding(t.levels, t.width)
        self.word_embed = nn.Linear(token_bits, t.width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(t.width, 6 * t.width))
        self.blocks = nn.ModuleList(TextBlock(t) for _ in range(t.depth))
        self.head_nm = HeadNorm(t.width, t.norm_eps)
        self.head = nn.Linear(t.width, 2 * token_bits)
        self._rope = rope_tables(spec)  # NumPy arrays, so that a module on `meta` has them too

    def guided_rows(
        self,
        features_BSC: Tensor,
        lengths_B: Tensor,
        negative: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append the unconditional rows: (features [2B, S, Ct], lengths [2B]).

        They are the features and lengths of negative prompts, or, without one, the trained
        features of "no prompt" with the length of the conditional prompt.
        """
        if negative is None:
            features = self.cfg_uncond[: features_BSC.shape[1]].expand_as(features_BSC)
            negative = features, lengths_B
        return torch.cat((features_BSC, negative[0])), torch.cat((lengths_B, negative[1]))

    def condition(self, features_GSC: Tensor, lengths_G: Tensor) -> TextCondition:
        """Compute what depends on the text of G rows: features [G, S, Ct], of which the first
        `lengths` count."""
        positions = torch.arange(features_GSC.shape[1], device=features_GSC.device)
        valid = positions < lengths_G.unsqueeze(1)
        normed = self.text_norm(features_GSC)
        text = self.text_proj_for_ca(normed)
        cond = self.text_proj_for_sos.ca(normed, valid[:, None, None])
        shared = self.shared_ada_lin(cond).unflatten(-1, (6, -1))
        blocks = [cast(TextBlock, block) for block in self.blocks]
        return TextCondition(
            valid=valid,
            normed=normed,
            text=text,
            cond=cond,
            shared=shared,
            blocks=[block.modulation(shared) for block in blocks],
            head=self.head_nm.modulation(cond),
            cross=[block.ca.keys_values(text) for block in blocks],
            first=cond.unsqueeze(1) + self.pos_start,
        )

    def embed(self, scale: int, input_BLe: Tensor | None, condition: TextCondition) -> Tensor:
        """Return the hidden states [G, L_k, C] that enter the blocks; input None at scale 0."""
        if input_BLe is None:
            x = condition.first
        else:
            x = self.word_embed(input_BLe)
            x = x.repeat(len(condition.first) // len(x), 1, 1)
        return x + self.lvl_embed.weight[scale]

    def step(
        self, scale: int, input_BLe: Tensor | None, condition: TextCondition, cache: Cache
    ) -> StepResult:
        """Run one scale, whose input [B, L_k, e] is None at scale 0; extends the cache.

        Both halves of the rows see the same input.
        """
        x = self.embed(scale, input_BLe, condition)
        cos, sin = (torch.from_numpy(table).to(x) for table in self._rope[scale])
        valid = condition.valid[:, None, None]
        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                condition.blocks[layer],
                condition.cross[layer],
                valid,
                cache,
                layer,
                partial(rotate, cos_LD=cos, sin_LD=sin),
            )
        return StepResult(hidden=x, logits=self.head(self.head_nm(x, condition.head)))

    def forward(self, inputs: Sequence[Tensor], condition: TextCondition) -> Tensor:
        """Return the raw logits [G, T, 2e] of all scales in one pass, for training.

        `inputs` are those of every scale but the first, [B, L_k, e]. A token sees its own scale and
        those before, so the logits are those of `step` scale by scale with the same inputs.
        """
        rows = [self.embed(scale, given, condition) for scale, given in enumerate((None, *inputs))]
        x = torch.cat(rows, dim=1)
        scale_T = torch.cat([torch.full((row.shape[1],), k) for k, row in enumerate(rows)])
        mask = (scale_T[:, None] >= scale_T[None, :]).to(x.device)
        cos, sin = (
            torch.cat([torch.from_numpy(tables[part]) for tables in self._rope]).to(x)
            for part in (0, 1)
        )
        turn = partial(rotate, cos_LD=cos, sin_LD=sin)
        valid = condition.valid[:, None, None]
        for layer, block in enumerate(self.blocks):
            text = condition.cross[layer]
            x = block(x, condition.blocks[layer], text, valid, None, layer, turn, mask)
        logits: Tensor = self.head(self.head_nm(x, condition.head))
        return logits


def rotate(x_GHLD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Turn neighbouring channels (2j, 2j + 1) by the angles of each token, [L, D/2]."""
    even, odd = x_GHLD.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos_LD - odd * sin_LD, even * sin_LD + odd * cos_LD), dim=-1)
    return turned.flatten(-2)
