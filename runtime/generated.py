"""`Images`: what a pipeline returns, an array that can be saved with what it was made from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from var_deploy.errors import UsageError
from var_deploy.image.images import (
    MOST_JPEG_TEXT,
    MOST_SIDE,
    grid,
    image_format,
    label_text,
    prompt_text,
    save_image,
    settings_text,
)
from var_deploy.manifest import Manifest
from var_deploy.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What N images were made from: enough to make each of them again.

    Attributes:
        labels: one per image, None where it has no class.
        seeds: one per image.
        source: of an edit or a variation, what is said of the image that it started from.
        scales_done: one per image where a deadline could stop it early, else None.
        columns: of the grid that they are saved as; None for one as square as N allows.
        prompts: one per image of a text-to-image model; empty where features were given.
    """

    manifest: Manifest
    precision: str
    sampling: Sampling
    labels: tuple[int | None, ...]
    seeds: tuple[int, ...]
    source: Mapping[str, str] = field(default_factory=dict)
    scales_done: tuple[int, ...] | None = None
    columns: int | None = None
    prompts: tuple[str, ...] = ()

    def take(self, rows: Sequence[int]) -> Origin:
        """That of some of the images."""
        done = self.scales_done
        return dataclasses.replace(
            self,
            labels=tuple(self.labels[n] for n in rows),
            seeds=tuple(self.seeds[n] for n in rows),
            scales_done=None if done is None else tuple(done[n] for n in rows),
            columns=None,
            prompts=tuple(self.prompts[n] for n in rows) if self.prompts else (),
        )

    def text(self) -> dict[str, str]:
        """What a file says of the images, in the words of `var-deploy generate`."""
        text = settings_text(self.manifest, self.precision, self.sampling, self.seeds)
        text |= self.source
        if not self.manifest.takes_text:
            text["labels"] = ", ".join(label_text(label, self.manifest) for label in self.labels)
        elif self.prompts:
            text["prompt"] = prompt_text(self.prompts)
        if self.scales_done is not None:
            done = ",".join(map(str, self.scales_done))
            text["scales_done"] = f"{done} of {self.manifest.model.scales}"
        return text


# the class itself is the base: the alias NDArray cannot be one, from NumPy 2.5 on Python 3.12 on
class Images(np.ndarray[Any, np.dtype[np.uint8]]):
    """uint8 [N, side, side, channels]: an array, which can be saved with its settings.

    Attributes:
        scales_done: [N] int64, scales that each image is made of; empty for views of it and for
            what is computed from it.
        origin: what the images were made from, which single images and slices of them keep; None
            for what is computed from them.
    """

    scales_done: NDArray[np.int64]
    origin: Origin | None

    @classmethod
    def blank(cls, shape: tuple[int, ...], scales_done: int) -> Images:
        images = np.empty(shape, np.uint8).view(cls)
        images.scales_done = np.full(shape[0], scales_done, np.int64)
        return images

    def __array_finalize__(self, source: object) -> None:
        self.scales_done = np.empty(0, np.int64)
        self.origin = None

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if self.origin is not None and self.ndim == 4 and isinstance(found, Images):
            if isinstance(key, slice):
                found.origin = self.origin.take(range(len(self))[key])
            elif isinstance(key, (int, np.integer)) and not isinstance(key, bool):
                found.origin = self.origin.take([range(len(self))[key]])
        return found

    def save(self, path: str | os.PathLike[str], *, columns: int | None = None) -> None:
        """Write one image, or several as a grid, as PNG, JPEG or WebP, which the suffix decides.

        The file carries settings, seeds, labels and the bundle's digest, as those of
        `var-deploy generate` do, and a grid looks as its does. `images[0].save(path)` writes one.

        Args:
            path: ends in .png, .jpg, .jpeg or .webp; missing folders are made.
            columns: of the grid; None takes one per label where that is at least as wide as high.

        Raises UsageError for another suffix, for a grid that the format cannot hold, and for an
        array that is no longer uint8 [N, H, W, C] or [H, W, C]; VarDeployError where the disk
        refuses.
        """
        file, sheet = Path(path), self._pictures()
        form = image_format(file)
        text: dict[str, str] = {}
        if self.origin is not None:
            text, columns = self.origin.text(), columns or self.origin.columns
        image = grid(sheet, columns) if len(sheet) != 1 else sheet[0]
        if max(image.shape) > MOST_SIDE[form]:
            raise UsageError(
                f"a {form} file has at most {MOST_SIDE[form]} pixels a side, this grid has "
                f"{image.shape[1]} × {image.shape[0]}: save it as .png"
            )
        if form == "JPEG" and len(json.dumps(text)) > MOST_JPEG_TEXT:
            raise UsageError(
                f"a JPEG file cannot hold the labels and seeds of {len(sheet):,} images: save them "
                "as .png"
            )
        save_image(file, image, text)

    def pil(self) -> list[Image.Image]:
        """Copies as PIL images, of mode RGB, or L with one channel. Raises UsageError as `save`."""
        return [
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            for image in self._pictures().copy()
        ]

    def _pictures(self) -> NDArray[np.uint8]:
        """A plain array [N, H, W, C] of them."""
        plain = self.view(np.ndarray)
        plain = plain[np.newaxis] if plain.ndim == 3 else plain
        if plain.ndim != 4 or plain.dtype != np.uint8 or plain.shape[-1] not in (1, 3):
            raise UsageError(
                "images are uint8 [N, H, W, C] or [H, W, C] with 1 or 3 channels, found "
                f"{self.dtype} {list(self.shape)}"
            )
        if not plain.size:
            raise UsageError(f"there are no images to save, found shape {list(self.shape)}")
        return plain
