"""`Sizes`: how large the images and tokens of a bundle are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest
from var_deploy.spec import TextModelSpec


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a model and its graphs.

    Attributes:
        height, width: of the images, in pixels.
        channels: of a pixel, 3 or 1.
        grids: rows and columns of the token grid of each of the K scales, coarse to fine.
        tokens: T, of an image: of all scales together.
        codes: of the codebook; of a text-to-image model the values of a bit, 2.
        bits: of a token of a text-to-image model; 0 for a model with a codebook.
        classes: labels are 0 … classes - 1; 0 for a model without classes.
        text_length: tokens of a prompt at most; 0 for a model that takes none.
        batch: images per launch; calls of more are cut into batches.
    """

    height: int
    width: int
    channels: int
    grids: tuple[tuple[int, int], ...]
    tokens: int
    codes: int
    bits: int
    classes: int
    text_length: int
    batch: int

    @property
    def side(self) -> int:
        """Side of square images, in pixels. Raises UsageError where they are not square."""
        if self.height != self.width:
            raise UsageError(f"images of {self.width} × {self.height} pixels have no one side")
        return self.height

    @property
    def scales(self) -> tuple[int, ...]:
        """Side length of the token map of each of the K scales. Raises UsageError where a map is
        not square."""
        if any(rows != columns for rows, columns in self.grids):
            raise UsageError("the token grids of this model are not square: see `grids`")
        return tuple(rows for rows, _ in self.grids)


def sizes_of(manifest: Manifest) -> Sizes:
    """Return the sizes of a bundle."""
    model = manifest.model
    text = model.transformer.text_length if isinstance(model, TextModelSpec) else 0
    height, width = model.tokenizer.image_size
    return Sizes(
        height=height,
        width=width,
        channels=model.tokenizer.image_channels,
        grids=model.grids,
        tokens=model.total_tokens,
        codes=model.tokenizer.token_values,
        bits=math.prod(model.token_shape) if model.token_shape else 0,
        classes=model.transformer.classes if model.transformer.conditional else 0,
        text_length=text,
        batch=manifest.batch,
    )
