"""Codebook learning for the tokenizer: moving averages and revival of unused codes.

The averages are those of VQ-VAE (van den Oord et al., arXiv 1711.00937, appendix A.1), summed over
all scales, since all scales share one codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MovingCodebook:
    """Moves the rows of a codebook [V, Cv] towards the means of the vectors assigned to them."""

    def __init__(self, weight: Tensor, decay: float = 0.98) -> None:
        self.weight, self.decay = weight, decay
        self.counts = torch.ones(len(weight))
        self.sums = weight.detach().clone()

    @torch.no_grad()
    def update(self, vectors_NC: Tensor, tokens_N: Tensor, revive: bool) -> int:
        """Take one step; return how many unused codes were revived with a random vector."""
        one_hot = torch.nn.functional.one_hot(tokens_N, len(self.weight)).to(vectors_NC.dtype)
        self.counts.lerp_(one_hot.sum(0), 1 - self.decay)
        self.sums.lerp_(one_hot.T @ vectors_NC, 1 - self.decay)
        dead = self.counts < 0.05
        revived = int(dead.sum()) if revive else 0
        if revived:
            picks = vectors_NC[torch.randint(len(vectors_NC), (revived,))]
            self.counts[dead] = 1.0
            self.sums[dead] = picks
        self.weight.copy_(self.sums / self.counts.clamp_min(1e-3).unsqueeze(1))
        return revived
