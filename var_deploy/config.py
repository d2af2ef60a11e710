"""Values that travel whole through the program instead of as loose strings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, kw_only=True)
class GraphForm:
    """What shapes the graphs of a model besides its sizes.

    Attributes:
        precision: of the products: "fp32", "fp16" or "int8".
        batch: B, images per launch.
        guidance: classifier-free guidance, which doubles the rows.
        more_smooth: mix codes as the published `more_smooth` does, see `sampling.smoothing`.
    """

    precision: Precision
    batch: int = 1
    guidance: bool = False
    more_smooth: bool = False

    @property
    def rows(self) -> int:
        """G: a row per image, and with guidance another one without a class."""
        return 2 * self.batch if self.guidance else self.batch
