"""Features of prompts that were never written, for work on a model whose text encoder is not at
hand.

Features are normalised before a transformer uses them, so numbers drawn from a normal distribution
have the size of real ones. What they do not have is meaning: they show whether graphs and model
agree, and how far values reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from var_deploy.runtime.prompts import PromptRows
from var_deploy.spec import TextTransformerSpec


def drawn_prompts(spec: TextTransformerSpec, keys: Sequence[tuple[int, int]]) -> PromptRows:
    """Return features [B, S, Ct] of B prompts of different lengths; each follows from its key."""
    features, lengths = [], []
    for one, number in keys:
        rng = np.random.Generator(np.random.Philox(key=np.array([one, number + 1], np.uint64)))
        features.append(rng.standard_normal((spec.text_length, spec.text_width), dtype=np.float32))
        lengths.append(int(rng.integers(1, spec.text_length + 1)))
    return PromptRows(features=np.stack(features), lengths=np.array(lengths, np.int64))
