"""The T5 encoder, version 1.1: RMS norm, gated GELU, relative position bias (arXiv 1910.10683).

Module and parameter names are the keys of the Hugging Face state dicts. There are no biases, and
attention scores are not divided by the square root of the head width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from var_deploy.spec import TextEncoderSpec

EMBEDDING = "shared.weight"
# the table of relative position biases, which serves the attention of every block
BIAS_TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def relative_buckets(spec: TextEncoderSpec, length: int | None = None) -> NDArray[np.int32]:
    """Return the row of the bias table for every query i and key j, [S, S].

    It depends on the distance n = |j - i|: exact below a quarter of the buckets, logarithmic up to
    `max_distance`, and one bucket beyond. Keys after the query use the second half of the table
    (arXiv 1910.10683, section 2.1, in the form of the released checkpoints).
    """
    places = np.arange(spec.length if length is None else length)
    distance = places[None, :] - places[:, None]
    return bucket_of(distance, spec.buckets, spec.max_distance)


def bucket_of(distance: NDArray[Any], buckets: int, max_distance: int) -> NDArray[np.int32]:
    """Return the bucket of each distance, key position - query position."""
    half = buckets // 2
    exact = half // 2
    n = np.abs(distance)
    # fp32, in the order of the published expression: its roundings decide at the borders
    ratio = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact))
    far = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + far.astype(np.int64), half - 1)
    found: NDArray[np.int32] = np.where(n < exact, n, far) + np.where(distance > 0, half, 0)
    return found.astype(np.int32)


class RmsNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class SelfAttention(nn.Module):
    """Multi-head attention over [B, S, Ct] with an additive bias [B, heads, S, S]."""

    def __init__(self, spec: TextEncoderSpec, first: bool) -> None:
        super().__init__()
        self.heads, inner = spec.heads, spec.heads * spec.head_width
        self.q = nn.Linear(spec.width, inner, bias=False)
        self.k = nn.Linear(spec.width, inner, bias=False)
        self.v = nn.Linear(spec.width, inner, bias=False)
        self.o = nn.Linear(inner, spec.width, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(spec.buckets, spec.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2)  # [B, heads, S, d]
            for part in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(h.transpose(1, 2).reshape(batch, length, -1))
        return out


class GatedGelu(nn.Module):
    """wo(gelu(wi_0 x) · wi_1 x) with tanh GELU (arXiv 2002.05202)."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.wi_1 = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.wo = nn.Linear(spec.ffn_width, spec.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return out


class AttentionLayer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, spec: TextEncoderSpec, first: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(spec, first)
        self.layer_norm = RmsNorm(spec.width, spec.norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return out


class FeedForwardLayer(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.DenseReluDense = GatedGelu(spec)
        self.layer_norm = RmsNorm(spec.width, spec.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class Block(nn.Module):
    """One encoder block [B, S, Ct] → [B, S, Ct]."""

    def __init__(self, spec: TextEncoderSpec, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(spec, first), FeedForwardLayer(spec)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = self.layer[1](self.layer[0](x, bias))
        return out


class Stack(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(spec, first=layer == 0) for layer in range(spec.depth))
        self.final_layer_norm = RmsNorm(spec.width, spec.norm_eps)


class T5Encoder(nn.Module):
    """Token ids to text features: the encoder half of a T5."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.shared = nn.Embedding(spec.vocab_size, spec.width)
        self.encoder = Stack(spec)

    def forward(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Return the features [B, S, Ct], zero where `mask_BS` is False.

        `mask_BS` is True for the tokens of a prompt, False for padding, which no token sees. S may
        be any length.
        """
        buckets = torch.from_numpy(relative_buckets(self.spec, ids_BS.shape[1])).long()
        table = self.get_submodule(BIAS_TABLE.removesuffix(".weight"))
        bias = table(buckets.to(ids_BS.device)).permute(2, 0, 1)[None]  # [1, heads, S, S]
        bias = bias.masked_fill(~mask_BS.bool()[:, None, None, :], float("-inf"))
        x = self.shared(ids_BS)
        for block in self.encoder.block:
            x = block(x, bias)
        features: Tensor = self.encoder.final_layer_norm(x)
        return features * mask_BS[..., None]
