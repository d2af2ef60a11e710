"""Facts about checkpoint files that the user gives beside the files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hints:
    """Facts that checkpoint files may lack; each is None where the user does not give it.

    Attributes:
        key, tokenizer_key: where the transformer and the tokenizer lie in their files, such as
            "trainer.var_wo_ddp"; "." is the top level.
        patch_nums: side length of each scale's token map, for a file without the buffer lvl_1L.
        heads: attention heads, for a model without L2 norm.
    """

    key: str | None = None
    tokenizer_key: str | None = None
    patch_nums: tuple[int, ...] | None = None
    heads: int | None = None


NO_HINTS = Hints()
