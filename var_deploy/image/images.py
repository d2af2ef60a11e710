"""Image files: grids, GIFs, and PNG, JPEG and WebP files that carry the settings of their images.

A PNG has the settings as text chunks. JPEG and WebP have them as JSON in EXIF's UserComment, where
`exiftool` and galleries show them, and the program's name as EXIF's Software.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngImageFile, PngInfo

from var_deploy import __version__
from var_deploy.errors import UsageError
from var_deploy.files import whole_file
from var_deploy.files.folders import filled_folder
from var_deploy.manifest import Manifest
from var_deploy.sampling import Sampling

BACKGROUND = 255  # of a grid: white

Format = Literal["PNG", "JPEG", "WebP"]
FORMATS: Mapping[str, Format] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}
MOST_SIDE: Mapping[Format, int] = {"PNG": 2**31 - 1, "JPEG": 65500, "WebP": 16383}  # pixels
MOST_JPEG_TEXT = 60_000  # bytes of settings: its EXIF has at most 64 kB
JPEG_QUALITY = 95
SOFTWARE, EXIF, USER_COMMENT = 0x0131, 0x8769, 0x9286  # EXIF 2.32, section 4.6
ASCII = b"ASCII\0\0\0"  # how a UserComment says what it is written in


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


def grid_columns(labels: int, count: int) -> int | None:
    """Columns for a grid of `count` images that repeat a list of so many labels.

    One per label where that makes a grid at least as wide as high; else None.
    """
    return labels if count % labels == 0 and labels * labels >= count else None


def save_png(path: Path, image: NDArray[np.uint8], text: Mapping[str, str]) -> None:
    """Write an image [H, W, 3] (or [H, W, 1]) with `text` as PNG text chunks; see `whole_file`."""
    with whole_file(path) as stream:
        write_png(stream, image, text)


def image_format(path: Path) -> Format:
    """What an image of this name is written as. Raises UsageError for another suffix, and where
    this Pillow was built without WebP."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        *others, last = FORMATS
        raise UsageError(
            f"images are written as {', '.join(others)} or {last}, found {path.name}: choose "
            "one of these suffixes"
        )
    if found == "WebP" and not features.check("webp"):
        png = path.with_suffix(".png").name
        raise UsageError(f"this Pillow cannot write WebP, found {path.name}: name {png} instead")
    return found


def save_image(path: Path, image: NDArray[np.uint8], text: Mapping[str, str]) -> None:
    """Write an image [H, W, 3] (or [H, W, 1]) with `text`, as its suffix says; see `image_format`
    and `whole_file`.

    PNG and WebP keep every pixel; JPEG has quality 95 without subsampling of colours.
    """
    form = image_format(path)
    with whole_file(path) as stream:
        if form == "PNG":
            write_png(stream, image, text)
        elif form == "JPEG":
            _as_picture(image).save(
                stream, format="jpeg", exif=_exif(text), quality=JPEG_QUALITY, subsampling=0
            )
        else:
            _as_picture(image).save(stream, format="webp", exif=_exif(text), lossless=True)


def _exif(text: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    if "Software" in text:
        exif[SOFTWARE] = text["Software"]
    told = json.dumps({key: _as_text(value) for key, value in text.items()})
    exif[EXIF] = {USER_COMMENT: ASCII + told.encode()}
    return exif.tobytes()


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
    """Return the model, precision and version that made an image, as text for its file."""
    return {
        "Software": f"var-deploy {__version__}",
        "model": manifest.preset or "no preset",
        "bundle": manifest.digest(),
        "precision": precision,
    }


def settings_text(
    manifest: Manifest, precision: str, sampling: Sampling, seeds: Sequence[int]
) -> dict[str, str]:
    """Return `origin_text` with settings and seeds: with the labels, enough to make it again."""
    return {
        **origin_text(manifest, precision),
        "seed": ",".join(map(str, seeds)),
        **sampling.texts(),
    }


def read_settings(path: Path) -> dict[str, str]:
    """The text that `save_png` or `save_image` stored; empty where an image has none.

    Raises UsageError where `path` is not a PNG, JPEG or WebP image.
    """
    try:
        with Image.open(path) as image:
            if isinstance(image, PngImageFile):
                return {key: str(value) for key, value in image.text.items()}
            if image.format not in ("JPEG", "WEBP"):
                raise UsageError(
                    f"{path} is {image.format}, not PNG, JPEG or WebP: it holds no settings"
                )
            return _from_exif(image.getexif())
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is not a PNG, JPEG or WebP image") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None


def _from_exif(exif: Image.Exif) -> dict[str, str]:
    """Return the text that `_exif` stored; empty for a comment of other origin."""
    comment = exif.get_ifd(EXIF).get(USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(ASCII):
        return {}
    try:
        found = json.loads(comment.removeprefix(ASCII))
    except (ValueError, RecursionError):
        return {}
    return {k: str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def prompt_text(prompts: Sequence[str]) -> str:
    """Return the text of a file about its images' prompts: the prompt, or a JSON list with one per
    image where they differ."""
    same = len(set(prompts)) == 1
    return prompts[0] if same else json.dumps(list(prompts), ensure_ascii=False)


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
        chunks.add_text(key, _as_text(value))
    level = 1 if quick else 6  # zlib's own default
    _as_picture(image).save(stream, format="png", pnginfo=chunks, compress_level=level)


def _as_text(value: str) -> str:
    """A value in characters: the name of a file may hold bytes that are not text."""
    return value.encode("utf-8", "replace").decode()


def _as_picture(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """PSNR of images in [0, 1] in dB: 200 for equal ones, -inf where a value is not finite."""
    error = float(np.square(found.astype(np.float64) - expected).mean())
    if not math.isfinite(error):
        return -math.inf
    return min(200.0, -10 * math.log10(max(error, 1e-20)))
