"""The features of prompts, as the condition graphs of a text-to-image model read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from var_deploy.config import Loaded
from var_deploy.text.prompt_tokenizer import TokenizedPrompt


class PromptEncoder(Protocol):
    """A text encoder: turns prompts into features."""

    def encode(
        self, prompts: Sequence[str], length: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the features [N, length, Ct] of N prompts and their lengths [N]."""
        ...

    def tokenize(self, prompt: str, length: int | None = None) -> TokenizedPrompt:
        """Return the tokens of a prompt and what is cut off beyond `length`."""
        ...

    def describe(self) -> Loaded:
        """Return what runs the encoder, which is loaded for that; `settings` holds its digest."""
        ...

    def knows(self, prompts: Sequence[str], length: int | None = None) -> bool:
        """Return whether the features of all these prompts are kept, so that `encode` need not
        load the weights."""
        ...

    def release(self) -> None:
        """Release the weights until the next prompt that needs them."""
        ...

    def close(self) -> None:
        """Release the weights; safe to call twice."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRows:
    """Text features of N prompts.

    Attributes:
        features: [N, S, Ct] fp32; what lies behind a prompt's tokens is not read.
        lengths: [N] tokens of each prompt, 1 … S.
        negative: of the negative prompts, one per prompt; None for what the model learned to take
            for "no prompt".
    """

    features: NDArray[np.float32]
    lengths: NDArray[np.int64]
    negative: PromptRows | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[N, S], True at the tokens of each prompt."""
        found: NDArray[np.bool_] = np.arange(self.features.shape[1]) < self.lengths[:, None]
        return found

    def rows(self, rows: Sequence[int]) -> PromptRows:
        """Return the features of some of the prompts, in this order."""
        chosen = list(rows)
        return PromptRows(
            features=self.features[chosen],
            lengths=self.lengths[chosen],
            negative=None if self.negative is None else self.negative.rows(chosen),
        )

    @classmethod
    def blank(cls, count: int, length: int, width: int) -> PromptRows:
        """Valid features of `count` prompts that say nothing."""
        return cls(
            features=np.zeros((count, length, width), np.float32),
            lengths=np.ones(count, np.int64),
        )
