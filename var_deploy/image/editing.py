"""What an edit keeps of an image: tokens, by a mask that is resized to every scale, and pixels.

A mask says True where the image is to be new. Scale k sees it averaged over the cells of its map
of tokens (`resize.area_matrix`); a token is drawn anew where more than THRESHOLD of its cell is to
be new, and stays elsewhere. The one token of scale 0, which sets the tone of the whole image, stays
as long as anything does: what stays at later scales was chosen for what it leaves to be said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import UnchangedError, UsageError
from var_deploy.image.resize import area_matrix

THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Tokens that are kept instead of sampled.

    Attributes:
        masks: one [B, L_k] bool a scale, True where the token stays.
        tokens: one [B, L_k] int64 a scale; read where the mask is True.
    """

    masks: tuple[NDArray[np.bool_], ...]
    tokens: tuple[NDArray[np.int64], ...]

    def rows(self, rows: Sequence[int]) -> Kept:
        """Return the kept tokens of some images, in this order."""
        chosen = list(rows)
        return Kept(
            masks=tuple(mask[chosen] for mask in self.masks),
            tokens=tuple(drawn[chosen] for drawn in self.tokens),
        )

    @classmethod
    def nothing(cls, lengths: Sequence[int], token_shape: Sequence[int] = ()) -> Kept:
        """Of one image whose scales have these lengths: every token is drawn.

        `token_shape` is that of a token, which may be several bits.
        """
        return cls(
            masks=tuple(np.zeros((1, n), np.bool_) for n in lengths),
            tokens=tuple(np.zeros((1, n, *token_shape), np.int64) for n in lengths),
        )

    @classmethod
    def joined(cls, parts: Sequence[Kept]) -> Kept:
        """Concatenate the kept tokens of several groups of images."""
        return cls(
            masks=tuple(map(np.concatenate, zip(*(part.masks for part in parts), strict=True))),
            tokens=tuple(map(np.concatenate, zip(*(part.tokens for part in parts), strict=True))),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A picture with the mask of its part to be generated, made by `pictures.read_edit`.

    Attributes:
        pixels: the picture, uint8 [1, height, width, C].
        new: bool [height, width], True where it is to be new.
        masks: one [L_k] bool a scale, True where the token stays, see `keep_masks`.
        keep_pixels: put the picture's own pixels back where it is not to be new.
    """

    pixels: NDArray[np.uint8]
    new: NDArray[np.bool_]
    masks: tuple[NDArray[np.bool_], ...]
    keep_pixels: bool

    def kept(self, tokens: Sequence[NDArray[np.int64]]) -> Kept:
        """Return what one image keeps; `tokens` [1, L_k] per scale are those of the picture."""
        return Kept(masks=tuple(mask[None] for mask in self.masks), tokens=tuple(tokens))

    def finish(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return generated images [N, H, W, C], with `keep_pixels` blended with the picture."""
        return blend(images, self.pixels[0], self.new) if self.keep_pixels else images


@dataclass(frozen=True, kw_only=True, eq=False)
class Variation:
    """More images like a picture: its tokens of the first scales, and new ones after them.

    Attributes:
        pixels: the picture, uint8 [1, side, side, C].
        from_scale: the first scale that is new, 0 … K.
    """

    pixels: NDArray[np.uint8]
    from_scale: int

    def kept(self, tokens: Sequence[NDArray[np.int64]]) -> Kept:
        """Return what one image keeps; `tokens` [1, L_k] per scale are those of the picture."""
        return Kept(
            masks=tuple(np.full(t.shape[:2], k < self.from_scale) for k, t in enumerate(tokens)),
            tokens=tuple(tokens),
        )

    def finish(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return generated images [N, H, W, C], which a variation leaves as they are."""
        return images


def keep_masks(
    new: NDArray[np.bool_],
    grids: Sequence[int | tuple[int, int]],
    threshold: float = THRESHOLD,
) -> list[NDArray[np.bool_]]:
    """Masks [L_k] of all scales: True keeps a token, as at most `threshold` of its cell is new.

    `new` is [height, width], True where the image is to be new; `grids` are rows and columns of
    each scale's tokens, or the side of a square one. Scale 0 stays unless all is new.

    Raises UnchangedError where every token stays, so that the edit would change nothing.
    """
    share = new.astype(np.float32)
    masks = []
    height, width = new.shape
    for grid in grids:
        rows, columns = (grid, grid) if isinstance(grid, int) else grid
        cells = area_matrix(height, rows) @ share @ area_matrix(width, columns).T
        masks.append(cells.reshape(-1) <= threshold + 1e-6)  # rounding must not decide
    masks[0][...] = not new.all()
    if all(mask.all() for mask in masks):
        cell = height / rows
        raise UnchangedError(
            "the mask is too small to change anything: a token of the finest scale stands for "
            f"{cell:g} × {cell:g} pixels of the model's {width} × {height}, and is drawn anew "
            f"where more than {threshold:.0%} of them are marked; at most {cells.max():.0%} are"
        )
    return masks


def box_mask(
    box: Sequence[float], height: int, width: int, outside: bool = False
) -> NDArray[np.bool_]:
    """[height, width], True inside x0 ≤ x < x1, y0 ≤ y < y1 in pixels (or outside of it).

    Raises UsageError for a box that is empty or leaves the image.
    """
    if len(box) != 4 or any(value != int(value) for value in box):
        raise UsageError(f"a box is four whole numbers x0,y0,x1,y1, found {tuple(box)}")
    x0, y0, x1, y1 = map(int, box)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UsageError(
            f"a box x0,y0,x1,y1 must lie in the image of {width} × {height}, with x0 < x1 and "
            f"y0 < y1, found {x0},{y0},{x1},{y1}"
        )
    mask = np.zeros((height, width), np.bool_)
    mask[y0:y1, x0:x1] = True
    return ~mask if outside else mask


def feather(new: NDArray[np.bool_], width: int) -> NDArray[np.float32]:
    """[H, W] weights of the new image: 0 outside the mask, rising inside it over `width` pixels.

    The seam lies within the mask, so that not a pixel outside of it changes.
    """
    weights = np.zeros(new.shape, np.float32)
    inner = new
    for _ in range(width):
        weights += inner
        inner = _shrink(inner)
    weights += inner
    weights /= width + 1
    return weights


def _shrink(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without its outermost pixels; the border of the image is no edge of it."""
    padded = np.pad(mask, 1, mode="edge")
    rows, columns = mask.shape
    shifted = [padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    smaller: NDArray[np.bool_] = np.logical_and.reduce(shifted)
    return smaller


def blend(
    new: NDArray[np.uint8], old: NDArray[np.uint8], mask: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """`new` [N, H, W, C] where the mask [H, W] says so and `old` [H, W, C] elsewhere.

    The seam is a 32nd of the image wide, at least one pixel.
    """
    weights = feather(mask, max(1, mask.shape[0] // 32))[..., None]
    mixed = old + weights * (new.astype(np.float32) - old)
    return np.rint(mixed).astype(np.uint8)
