"""Image files: grids, GIFs, and PNGs that carry the settings they were made with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from var_deploy import __version__
from var_deploy.errors import UsageError
from var_deploy.files import whole_file
from var_deploy.files.folders import filled_folder
from var_deploy.manifest import Manifest
from var_deploy.sampling import Sampling

BACKGROUND = 255  # of a grid: white


def grid(images: NDArray[np.uint8], columns: int | None = None, gap: int = 2) -> NDArray[np.uint8]:
    """Images [N, H, W, C] in reading order as one image, `gap` white pixels apart.

    Without `columns` the grid is as square as N allows. Raises UsageError where N or columns is 0.
    """
    if images.ndim != 4 or not len(images):
        raise UsageError(f"a grid needs images [N, H, W, C], found shape {images.shape}")
    count, height, width, channels = images.shape
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if columns < 1 or gap < 0:
        raise UsageError(f"a grid needs 1 column and gap 0 or more, found {columns} and {gap}")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    sheet = np.full(shape, BACKGROUND, np.uint8)
    for n, image in enumerate(images):
        top, left = n // columns * (height + gap), n % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(path: Path, image: NDArray[np.uint8], text: Mapping[str, str]) -> None:
    """Write an image [H, W, 3] (or [H, W, 1]) with `text` as PNG text chunks; see `whole_file`."""
    with whole_file(path) as stream:
        write_png(stream, image, text)


def save_gif(path: Path, frames: NDArray[np.uint8], milliseconds: Sequence[int]) -> None:
    """Write frames [K, H, W, 3] (or [K, H, W, 1]) as a GIF that repeats; see `whole_file`.

    Each is shown for its milliseconds, and loses what 256 colours of its own cannot show.
    """
    first, *others = (_as_picture(frame) for frame in frames)
    with whole_file(path) as stream:
        first.save(
            stream,
            format="gif",
            save_all=True,
            append_images=others,
            duration=list(milliseconds),
            loop=0,
        )


def save_folder(
    folder: Path,
    file_names: Sequence[str],
    images: NDArray[np.uint8],
    texts: Sequence[Mapping[str, str]],
) -> None:
    """Write images [N, H, W, C] as single PNGs into `folder`: all of them, or none.

    They are written to a work folder first. Files of other names in the folder stay; of two
    writers at once, one after the other moves all of its images in. Raises UsageError where one
    of the names is a folder there, VarDeployError where the disk refuses.
    """
    with filled_folder(folder, file_names) as work:
        for name, image, text in zip(file_names, images, texts, strict=True):
            with (work / name).open("xb") as stream:
                write_png(stream, image, text)


def origin_text(manifest: Manifest, precision: str) -> dict[str, str]:
    """What made an image, for the text of its PNG."""
    return {
        "Software": f"var-deploy {__version__}",
        "model": manifest.preset or "no preset",
        "bundle": manifest.digest(),
        "precision": precision,
    }


def settings_text(
    manifest: Manifest, precision: str, sampling: Sampling, seeds: Sequence[int]
) -> dict[str, str]:
    """The same, and what it was drawn with: enough, with labels, to make it again."""
    return {
        **origin_text(manifest, precision),
        "seed": ",".join(map(str, seeds)),
        **sampling.texts(),
    }


def read_settings(path: Path) -> dict[str, str]:
    """The text that `save_png` stored. Raises UsageError where `path` is no PNG."""
    try:
        with Image.open(path) as image:
            if not isinstance(image, PngImageFile):
                raise UsageError(f"{path} is {image.format}, not PNG: it holds no settings")
            return {key: str(value) for key, value in image.text.items()}
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is not a PNG image") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None


def label_text(label: int | None, manifest: Manifest) -> str:
    """ "3 tree", "3" where the classes have no names, "none" without a class."""
    if label is None:
        return "none"
    return f"{label} {manifest.labels[label]}" if manifest.labels else str(label)


def write_png(
    stream: BinaryIO, image: NDArray[np.uint8], text: Mapping[str, str], *, quick: bool = False
) -> None:
    """An image [H, W, 3] (or [H, W, 1]) as PNG; `quick` takes more bytes and less time."""
    chunks = PngInfo()
    for key, value in text.items():
        # a file's name may hold bytes that are no text
        chunks.add_text(key, value.encode("utf-8", "replace").decode())
    level = 1 if quick else 6  # zlib's own default
    _as_picture(image).save(stream, format="png", pnginfo=chunks, compress_level=level)


def _as_picture(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Of images in [0, 1], in dB; 200 stands for equal, -inf where a value is no number."""
    error = float(np.square(found.astype(np.float64) - expected).mean())
    if not math.isfinite(error):
        return -math.inf
    return min(200.0, -10 * math.log10(max(error, 1e-20)))
