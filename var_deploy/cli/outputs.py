"""Where a command's images go: one PNG, a grid of several, or a folder of single ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import UsageError
from var_deploy.images import check_writable, grid, label_text, save_folder, save_png
from var_deploy.labels import resolve_labels_or_none
from var_deploy.manifest import Manifest
from var_deploy.pictures import MAX_PIXELS

MOST_FILES = 100_000  # that `generate` writes into a folder


@dataclass(frozen=True, kw_only=True)
class Target:
    """What --out asks for; `folder` for single images."""

    path: Path
    folder: bool


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Images of a request, for writing.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: one an image, None where it has no class.
        seeds: one for all, which numbers its images, or one an image.
        text: what they have in common, for the text of their PNGs.
        scales_done: [N], scales that each is made of; None where nothing could stop it early.
    """

    manifest: Manifest
    images: NDArray[np.uint8]
    labels: Sequence[int | None]
    seeds: Sequence[int]
    text: Mapping[str, str]
    scales_done: Sequence[int] | None = None

    def save(self, target: Target, columns: int | None = None) -> dict[str, str]:
        """Write them; returns the text of all of them together."""
        whole = self._text(range(len(self.images)))
        if target.folder:
            indices = range(len(self.images))
            texts = [{**self._text([n]), **self._place(n)} for n in indices]
            save_folder(target.path, [self._file_name(n) for n in indices], self.images, texts)
        else:
            sheet = self.images[0] if len(self.images) == 1 else grid(self.images, columns)
            save_png(target.path, sheet, whole)
        return whole

    def __str__(self) -> str:
        """What was drawn, in a few words."""
        count, height, width = self.images.shape[:3]
        words = f"{count} images" if count > 1 else "1 image"
        return f"{words} of {width} × {height}"

    def stopped(self) -> str:
        """How far each image came, in one line; "" where nothing could stop it early."""
        if self.scales_done is None:
            return ""
        parts, first = [], 0
        for done, same in itertools.groupby(self.scales_done):
            last = first + len(list(same)) - 1
            which = f"image {first}" if first == last else f"images {first} to {last}"
            parts.append(f"{which}: {done} of {self.manifest.model.scales} scales")
            first = last + 1
        return "; ".join(parts)

    def _text(self, indices: Sequence[int]) -> dict[str, str]:
        text = dict(self.text)
        text["labels"] = ", ".join(label_text(self.labels[n], self.manifest) for n in indices)
        if self.scales_done is not None:
            done = ",".join(str(self.scales_done[n]) for n in indices)
            text["scales_done"] = f"{done} of {self.manifest.model.scales}"
        return text

    def _place(self, image: int) -> dict[str, str]:
        """Which image of which request it is: one with a seed of its own is the first of its."""
        if len(self.seeds) == 1:
            return {"image": f"{image} of {len(self.images)}"}
        return {"seed": str(self.seeds[image]), "image": "0 of 1"}

    def _file_name(self, image: int) -> str:
        """000_star.png; without names 000_17.png, without a class 000.png."""
        label = self.labels[image]
        if label is None:
            return f"{image:03d}.png"
        name = self.manifest.labels[label] if self.manifest.labels else str(label)
        plain = re.sub(r"\W+", "-", name.split(",")[0]).strip("-")[:40] or str(label)
        return f"{image:03d}_{plain}.png"


def image_target(out: str) -> Target:
    """What `out` asks for, once it is sure that it can be written. Raises UsageError.

    A trailing slash asks for a folder, and so does a name without a suffix.
    """
    path = Path(out)
    if path.is_dir() or out.endswith(("/", "\\")) or not path.suffix:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; name a .png file or a folder")
        check_writable(path)
        return Target(path=path, folder=True)
    return Target(path=output_file(path, ".png"), folder=False)


def most_at_once(side: int) -> int:
    """Images of side × side pixels that are kept in memory together, and that a grid may have."""
    return max(1, MAX_PIXELS // side**2)


def check_at_once(count: int, side: int, hint: str = "") -> None:
    """Raise UsageError for more images than are kept in memory together."""
    if count > (most := most_at_once(side)):
        raise UsageError(
            f"{count:,} images of {side} × {side} are too many for one grid or one request, which "
            f"have at most {MAX_PIXELS // 10**6} million pixels, {most:,} images: ask for fewer"
            f"{hint}"
        )


def check_files(count: int) -> None:
    """Raise UsageError for more images than a folder of single ones gets."""
    if count > MOST_FILES:
        raise UsageError(
            f"a folder gets at most {MOST_FILES:,} images, found {count:,}: make a set with "
            "var-deploy sample, which also goes on where it was stopped"
        )


def output_file(path: Path, suffix: str) -> Path:
    """The same path, once it is sure that a file of this kind can be written there.

    Raises UsageError.
    """
    if path.suffix.lower() != suffix:
        what = "tokens" if suffix == ".npz" else "images"
        raise UsageError(f"{what} are written as {suffix}, found {path.name}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not an ordinary file; choose another output")
    check_writable(path)
    return path


def known_labels(text: str | Sequence[str], manifest: Manifest, option: str) -> list[int | None]:
    """Class numbers of labels as people write them, None for "none". Raises UsageError
    (LabelError)."""
    transformer = manifest.model.transformer
    classes = transformer.classes if transformer.conditional else 0
    try:
        return resolve_labels_or_none(text, manifest.labels, classes)
    except UsageError:
        if transformer.conditional:
            raise
        raise UsageError(f"this model has no classes: leave {option} out") from None
