"""Guidance, filtering and drawing of bits as published for Infinity: the reference for the graphs'
bit sampler."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(raw_GLV: Tensor, cfg: float, temperature: float, batch: int) -> Tensor:
    """Raw logits [G, L, 2e] → logits [B, L, 2e]: temperature, then classifier-free guidance.

    The strength counts from 1: cfg·conditional + (1 - cfg)·unconditional. B rows are conditional
    ones alone and are not guided.
    """
    logits = raw_GLV / temperature
    if len(logits) == batch:
        return logits
    return cfg * logits[:batch] + (1 - cfg) * logits[batch:]


def probability_of_one(logits_BLV: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits [..., 2e] → probability [..., e] that each bit is 1, after the filters.

    Entry 2j speaks for bit j = 0, entry 2j + 1 for bit j = 1. Top-k (if > 0) matters at 1 alone:
    the larger logit is kept, both where they are equal. Top-p (if > 0) drops the less probable
    value where its probability is ≤ 1 - p.
    """
    pairs: Tensor = logits_BLV.unflatten(-1, (-1, 2))
    if top_k == 1:
        pairs = pairs.masked_fill(pairs < pairs.amax(-1, keepdim=True), -torch.inf)
    p1: Tensor = pairs.softmax(dim=-1)[..., 1]
    if top_p <= 0:
        return p1
    one_is_likelier = pairs[..., 1] >= pairs[..., 0]  # at a tie the published sort drops bit 0
    drop_one = (p1 <= 1 - top_p) & ~one_is_likelier
    drop_zero = (pairs.softmax(dim=-1)[..., 0] <= 1 - top_p) & one_is_likelier
    return p1.masked_fill(drop_one, 0.0).masked_fill(drop_zero, 1.0)


def greedy_bits(logits_BLV: Tensor) -> Tensor:
    """Logits [..., 2e] → the likelier value of each bit [..., e], 0 where both are as likely."""
    pairs: Tensor = logits_BLV.unflatten(-1, (-1, 2))
    return (pairs[..., 1] > pairs[..., 0]).to(torch.uint8)


def draw_bits(p1_BLe: Tensor, uniforms_BLe: Tensor) -> tuple[Tensor, Tensor]:
    """Draw bits [B, L, e] by inverse CDF; return them and how far each uniform lies from its
    threshold.

    A bit is 1 where its uniform in [0, 1) is at least the probability of 0.
    """
    distance = uniforms_BLe.double() - (1 - p1_BLe.double())
    return (distance >= 0).to(torch.uint8), distance.abs()
