"""Output files and folders of commands, which are checked before anything is computed.

Images go into one PNG, JPEG or WebP file, a grid of several, or a folder of single PNGs. One PNG
may go to standard output, written as "-"; what a command tells otherwise goes to stderr then.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from var_deploy.cli.console import echo, say
from var_deploy.config import Loaded
from var_deploy.errors import UsageError, VarDeployError
from var_deploy.files import check_ordinary, check_writable
from var_deploy.image.images import (
    MOST_JPEG_TEXT,
    MOST_SIDE,
    grid,
    image_format,
    label_text,
    prompt_text,
    save_folder,
    save_image,
    write_png,
)
from var_deploy.image.pictures import MAX_PIXELS
from var_deploy.labels import resolve_labels_or_none
from var_deploy.manifest import Manifest
from var_deploy.spec import Grid

MOST_FILES = 100_000  # that `generate` writes into a folder

STDOUT = "-"
# of the text of an image, what has another type than text in JSON
TYPED = ("seed", "cfg", "top_k", "top_p", "temperature", "box", "outside", "keep_pixels")


class OutputPath(click.Path):
    """The type of options that name a file or folder to write: a Path that has a name.

    An empty one would be the current folder, and "-" stands for standard output, to which most
    commands have nothing to write.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if value in ("", STDOUT):
            self.fail(refusal(value), param, ctx)
        return super().convert(value, param, ctx)


OUTPUT = OutputPath()


def refusal(name: str) -> str:
    """Return the error message for an output that is called "" or "-"."""
    if name == STDOUT:
        return '"-" is standard output, which takes one PNG and nothing else; name a file or folder'
    return "the name is empty; name a file or folder"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The output that --out names: one PNG, JPEG or WebP file; with `folder` a folder of PNGs, with
    `stdout` one PNG on standard output."""

    path: Path
    folder: bool = False
    stdout: bool = False

    def check_sheet(
        self,
        manifest: Manifest,
        count: int,
        columns: int | None = None,
        labels: Sequence[int | None] = (),
        prompts: Sequence[str] = (),
    ) -> None:
        """Raise UsageError where a grid of `count` images, with what is told of them, does not fit
        the format of the file."""
        if self.folder or self.stdout:
            return
        form = image_format(self.path)
        rows, wide = (size + 2 for size in manifest.model.tokenizer.image_size)
        columns = min(columns or math.ceil(math.sqrt(count)), count)
        width, height = columns * wide - 2, math.ceil(count / columns) * rows - 2
        instead = f"name {self.path.with_suffix('.png').name} instead"
        if max(width, height) > MOST_SIDE[form]:
            raise UsageError(
                f"a {form} file has at most {MOST_SIDE[form]} pixels a side, this grid would have "
                f"{width} × {height}: {instead}"
            )
        told = sum(len(json.dumps(label_text(label, manifest))) + 24 for label in labels)
        told += len(json.dumps(prompt_text(prompts))) if prompts else 0
        if form == "JPEG" and told > MOST_JPEG_TEXT:  # 24: separators, and the digits of a seed
            raise UsageError(
                f"a JPEG file holds the labels and seeds of some {MOST_JPEG_TEXT // 30} images, "
                f"found {count:,}: {instead}"
            )

    def save(self, image: NDArray[np.uint8], text: Mapping[str, str]) -> None:
        """Write one image [H, W, C]. Raises VarDeployError where the disk or the pipe refuses."""
        if not self.stdout:
            save_image(self.path, image, text)
            return
        whole = io.BytesIO()
        write_png(whole, image, text)
        stream = sys.stdout.buffer
        try:
            stream.write(whole.getvalue())
            stream.flush()
        except OSError as error:
            # what is left in its buffer would fail again when Python ends
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
            why = error.strerror or error
            raise VarDeployError(f"standard output cannot be written: {why}") from None

    def tell(self, line: str) -> None:
        """Print a line about what was written where it does not mix with the image."""
        say(line, err=self.stdout)

    def tell_json(self, data: Mapping[str, Any]) -> None:
        """Print a report as JSON, on stderr where the image goes to stdout."""
        echo(json.dumps(data, indent=1, default=str), err=self.stdout)

    def __str__(self) -> str:
        return "standard output" if self.stdout else str(self.path)


@dataclass(frozen=True, kw_only=True)
class GeneratedImages:
    """Generated images with the values that their files record.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: one per image, None for an image without a class.
        prompts: one per image of a text-to-image model; else empty.
        seeds: one per image.
        text: what they have in common, for the text of their PNGs.
        scales_done: [N], scales that each is made of; None where nothing could stop it early.
    """

    manifest: Manifest
    images: NDArray[np.uint8]
    labels: Sequence[int | None]
    seeds: Sequence[int]
    text: Mapping[str, str]
    scales_done: Sequence[int] | None = None
    prompts: Sequence[str] = ()

    def save(self, target: Target, columns: int | None = None) -> dict[str, str]:
        """Write the images to the target; returns the settings text of all of them together."""
        whole = self._text(range(len(self.images)))
        if target.folder:
            indices = range(len(self.images))
            texts = [self._text([n]) for n in indices]
            save_folder(target.path, [self._file_name(n) for n in indices], self.images, texts)
        else:
            sheet = self.images[0] if len(self.images) == 1 else grid(self.images, columns)
            target.save(sheet, whole)
        return whole

    def settings(self, text: Mapping[str, str]) -> dict[str, Any]:
        """`text`, which `save` returned, as JSON values: labels as a list of numbers, None for an
        image without a class, and label_names where the classes have names."""
        data = json_settings(text)
        if self.prompts:
            data["prompt"] = list(self.prompts)
        else:
            data["labels"] = list(self.labels)
        if names := self.manifest.labels:
            data["label_names"] = [None if n is None else names[n] for n in self.labels]
        if self.scales_done is not None:
            data["scales_done"] = list(self.scales_done)
        return data

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
        text["seed"] = ",".join(str(self.seeds[n]) for n in indices)
        if self.prompts:
            text["prompt"] = prompt_text([self.prompts[n] for n in indices])
        else:
            text["labels"] = ", ".join(label_text(self.labels[n], self.manifest) for n in indices)
        if self.scales_done is not None:
            done = ",".join(str(self.scales_done[n]) for n in indices)
            text["scales_done"] = f"{done} of {self.manifest.model.scales}"
        return text

    def _file_name(self, image: int) -> str:
        """000_star.png; without names 000_17.png, without a class 000.png; of a prompt its
        beginning, 000_a-red-star.png."""
        label = self.labels[image]
        if self.prompts:
            plain = re.sub(r"\W+", "-", self.prompts[image])[:40].strip("-")
        elif label is None:
            plain = ""
        else:
            name = self.manifest.labels[label] if self.manifest.labels else str(label)
            plain = re.sub(r"\W+", "-", name.split(",")[0]).strip("-")[:40] or str(label)
        return f"{image:03d}_{plain}.png" if plain else f"{image:03d}.png"


def image_target(out: str) -> Target:
    """What `out` asks for, once it is sure that it can be written. Raises UsageError.

    A trailing slash asks for a folder, and so does a name without a suffix; "-" for one PNG on
    standard output.
    """
    if out == STDOUT:
        return file_target(out)
    if not out:
        raise UsageError(f"--out: {refusal(out)}")
    path = Path(out)
    check_writable(path)  # first, because looking at a name that is too long is an error
    if path.is_dir() or out.endswith(("/", "\\")) or not path.suffix:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; name a .png, .jpg or .webp file, or a folder")
        return Target(path=path, folder=True)
    return Target(path=image_file(path))


def file_target(out: str) -> Target:
    """Return the target for one image: a file, or standard output. Raises UsageError."""
    if not out:
        raise UsageError(f"--out: {refusal(out)}")
    if out != STDOUT:
        return Target(path=image_file(Path(out)))
    if sys.stdout is None or sys.stdout.isatty():
        raise UsageError(
            "--out - writes a PNG to standard output, which is a terminal or closed: redirect it "
            "to a file or a program, or name a file"
        )
    return Target(path=Path(out), stdout=True)


def json_settings(text: Mapping[str, str]) -> dict[str, Any]:
    """The text of an image as JSON values: what is a number, or a list of them with commas, as
    numbers, "yes" as true."""
    return {k: _value(v) if k in TYPED else v for k, v in text.items()}


def _value(text: str) -> Any:
    if text == "yes":
        return True
    numbers = [float(part) if re.search("[.e]", part) else int(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def runtime_json(how: Loaded) -> dict[str, Any]:
    """Return backend, precision and layout as JSON values."""
    return {**how.to_json(), **({} if how.threads is None else {"threads": how.threads})}


def most_at_once(size: Grid) -> int:
    """Images of this height and width that are kept in memory together, and that a grid may
    have."""
    return max(1, MAX_PIXELS // math.prod(size))


def check_at_once(count: int, size: Grid, hint: str = "") -> None:
    """Raise UsageError for more images than are kept in memory together."""
    if count > (most := most_at_once(size)):
        raise UsageError(
            f"{count:,} images of {size[1]} × {size[0]} are too many for one grid or one request, "
            f"which have at most {MAX_PIXELS // 10**6} million pixels, {most:,} images: ask for "
            f"fewer{hint}"
        )


def check_files(count: int) -> None:
    """Raise UsageError for more images than a folder of single ones gets."""
    if count > MOST_FILES:
        raise UsageError(
            f"a folder gets at most {MOST_FILES:,} images, found {count:,}: make a set with "
            "var-deploy sample, which also goes on where it was stopped"
        )


def output_file(path: Path, suffix: str) -> Path:
    """Return `path` after checking that a file with this suffix can be written there.

    Raises UsageError.
    """
    if path.suffix.lower() != suffix:
        what = "tokens" if suffix == ".npz" else "images"
        raise UsageError(f"{what} are written as {suffix}, found {path.name}")
    return _writable(path)


def image_file(path: Path) -> Path:
    """Return `path` after checking that a PNG, JPEG or WebP file can be written there.

    Raises UsageError.
    """
    image_format(path)
    return _writable(path)


def _writable(path: Path) -> Path:
    check_writable(path)
    check_ordinary(path)
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
