"""The published sampling filter, inverse CDF and code mixing in PyTorch: the reference for the
graphs' sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from var_deploy.sampling import smoothing


def guide(logits_GLV: Tensor, strength: float, batch: int) -> Tensor:
    """Classifier-free guidance: (1 + t)·conditional - t·unconditional; B rows stay as they are."""
    if len(logits_GLV) == batch:
        return logits_GLV
    return (1 + strength) * logits_GLV[:batch] - strength * logits_GLV[batch:]


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Filter [..., V]: return a copy with -inf where top-k (if > 0), then top-p (if > 0), drop a
    code.

    Top-k keeps every logit ≥ the k-th largest. Top-p sorts ascending and drops what has a
    cumulative probability ≤ 1 - p; the largest always stays.
    """
    logits = logits.clone()
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits.masked_fill_(logits < kth, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[..., -1] = False
        logits.masked_fill_(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def draw(filtered_BLV: Tensor, uniforms_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Sample tokens [B, L] by inverse CDF in fp64; return them and their margins [B, L].

    The margin is how far the uniform lies from the nearest end of the token's interval: rounding
    smaller than it cannot change the token.
    """
    probabilities = filtered_BLV.double().softmax(dim=-1)
    cdf = probabilities.cumsum(dim=-1)
    cdf = cdf / cdf[..., -1:]
    u = uniforms_BL.double().unsqueeze(-1)
    allowed = (cdf > u) & (probabilities > 0)
    tokens = allowed.int().argmax(dim=-1)
    upper = cdf.gather(-1, tokens.unsqueeze(-1))
    lower = upper - probabilities.gather(-1, tokens.unsqueeze(-1))
    margins = torch.minimum(upper - u, u - lower).squeeze(-1)
    return tokens, margins


def mix_weights(filtered_BLV: Tensor, noise_BLV: Tensor, scale: int, scales: int) -> Tensor:
    """Return the weights [B, L, V] of the codes in "more smooth" sampling, see
    `sampling.smoothing`.

    Computed in fp64, so that a difference from it is the graph's rounding alone.
    """
    factor, tau = smoothing(scale, scales)
    x = (filtered_BLV.double() * factor + noise_BLV.double()) / tau
    return x.softmax(dim=-1).to(filtered_BLV.dtype)
