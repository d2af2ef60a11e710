"""Reads pictures and masks of any size and format, and fits them to the input of a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from var_deploy.errors import UsageError
from var_deploy.image.editing import Edit, keep_masks
from var_deploy.spec import BitTokenizerSpec, TokenizerSpec

# VAR's training resizes the short side to round(1.125 · side) with a Lanczos filter and crops.
MARGIN = 1.125
MAX_PIXELS = 80_000_000  # a picture of more is refused before it is unpacked

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
Mask = str | os.PathLike[str] | Image.Image | NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The size of a model's images, and how a picture is cut and resized to it.

    Attributes:
        margin: see `fit`, for a square frame; 1 resizes a picture to cover the frame, as the
            training of Infinity does.
    """

    height: int
    width: int
    margin: float = MARGIN

    def fit(
        self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS
    ) -> Image.Image:
        """height × width pixels of an image; one of this very size stays as it is."""
        if self.margin != 1:
            return fit(image, self.height, resample)
        if image.size == (self.width, self.height):
            return image
        image = _strip(image, self.width / self.height)
        factor = max(self.width / image.width, self.height / image.height)
        size = (
            max(round(image.width * factor), self.width),
            max(round(image.height * factor), self.height),
        )
        return _centre(image.resize(size, resample), self.width, self.height)


def frame_of(tokenizer: TokenizerSpec | BitTokenizerSpec) -> Frame:
    """Return the frame of a tokenizer."""
    height, width = tokenizer.image_size
    margin = 1.0 if isinstance(tokenizer, BitTokenizerSpec) else MARGIN
    return Frame(height=height, width=width, margin=margin)


def _frame(side: int | Frame) -> Frame:
    return side if isinstance(side, Frame) else Frame(height=side, width=side)


def read_pictures(
    pictures: Picture | Sequence[Picture], side: int | Frame, channels: int
) -> NDArray[np.uint8]:
    """Pictures as the model takes them: uint8 [N, height, width, channels], see `Frame.fit`.

    Args:
        side: of a square frame, or a frame.
        pictures: a path, a PIL image, an array uint8 [H, W] or [H, W, 1, 3 or 4]; several of them
            as a sequence, or as an array [N, H, W, C].

    Raises UsageError for a file that is not a picture, or has more than MAX_PIXELS pixels.
    """
    several: Sequence[Any]
    if isinstance(pictures, np.ndarray):
        several = list(pictures) if pictures.ndim == 4 else [pictures]
    elif isinstance(pictures, (str, os.PathLike, Image.Image)):
        several = [pictures]
    else:
        several = pictures
    if not len(several):
        raise UsageError("no picture given")
    frame = _frame(side)
    fitted = [frame.fit(upright(one, channels)) for one in several]
    stacked = np.stack([np.asarray(image, np.uint8) for image in fitted])
    return stacked.reshape(len(fitted), frame.height, frame.width, channels)


def upright(picture: Picture, channels: int = 3) -> Image.Image:
    """A picture in RGB (or grey, for one channel): turned as its EXIF tag says, alpha over white.

    Of an animation, or of a file with several pages, the first is taken. Grey pictures may have 16
    bits, or floats from 0 (black) to 1 (white).

    Raises UsageError as `read_pictures` does, and for 32-bit pixels whose white is not known.
    """
    image = _in_8_bits(_opened(picture), _name(picture))
    if _has_alpha(image):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB" if channels == 3 else "L")


def read_mask(
    mask: Mask, width: int, height: int, side: int | Frame, outside: bool = False
) -> NDArray[np.bool_]:
    """A mask as the model takes it: bool [height, width] of its frame, True where the image is to
    be new.

    Args:
        mask: bool [H, W]; or an image, new where it is white (brighter than half), or, where parts
            of it are transparent, where it is transparent. Of an image whose pixels are 0 and one
            other number, such as 0 and 1, new where it is not 0.
        width, height: of the picture that it belongs to, upright. The mask has this size, or
            already the pixels of the model's frame.
        outside: turn it around, so that the image is to be new where the mask says it is not.

    Raises UsageError for another size, and for a mask that asks for nothing.
    """
    if isinstance(mask, np.ndarray):
        if mask.ndim != 2 or mask.dtype != np.bool_:
            raise UsageError(f"a mask is bool [H, W], found {mask.dtype} {list(mask.shape)}")
        new = mask
    else:
        name = "the mask" if isinstance(mask, Image.Image) else os.fspath(mask)
        image = _opened(mask)
        alpha = None
        if _has_alpha(image):
            alpha = np.asarray(_in_8_bits(image, name).convert("RGBA"))[..., 3]
        if alpha is not None and alpha.min() < 255:
            new = alpha < 128
        else:
            new = _bright(image, name)
            if not new.any() and not outside:
                brightest = np.asarray(upright(image, 1)).max()
                raise UsageError(
                    f"{name} marks nothing: its brightest pixel is {brightest} of 255, and white, "
                    "brighter than half, is what marks"
                )
    rows, columns = new.shape
    frame = _frame(side)
    if (columns, rows) not in ((width, height), (frame.width, frame.height)):
        raise UsageError(
            f"the mask has {columns} × {rows} pixels, expected those of the picture, "
            f"{width} × {height}"
        )
    new = ~new if outside else new
    fitted = frame.fit(Image.fromarray(255 * new.astype(np.uint8)), Image.Resampling.BOX)
    found: NDArray[np.bool_] = np.asarray(fitted) >= 128
    if not found.any():
        raise UsageError("the mask marks nothing that could be drawn anew")
    return found


def read_edit(
    picture: Picture,
    mask: Mask,
    tokenizer: TokenizerSpec | BitTokenizerSpec,
    *,
    outside: bool = False,
    keep_pixels: bool = False,
) -> Edit:
    """A picture and its mask as an edit of the model needs them; see `read_mask`.

    Raises UsageError for files that are not a picture and a mask of it, and UnchangedError where
    the mask is too small to change a token.
    """
    frame, channels = frame_of(tokenizer), tokenizer.image_channels
    image = upright(picture, channels)
    new = read_mask(mask, image.width, image.height, frame, outside)
    masks = keep_masks(new, tokenizer.grids)
    return Edit(
        pixels=read_pictures(image, frame, channels),
        new=new,
        masks=tuple(masks),
        keep_pixels=keep_pixels,
    )


def _bright(image: Image.Image, name: str) -> NDArray[np.bool_]:
    """Where an image of a mask is white. Masks of other programs have 0 and 1, or 0 and the number
    of a class, which would all be black as a picture."""
    deep = image.mode.startswith("I") or image.mode == "F"
    values = np.asarray(image if deep else upright(image, 1))
    marked: NDArray[np.bool_] = values > 0
    if values.min() >= 0 and marked.any() and (values[marked] == values.max()).all():
        two = not marked.all()  # 0 and one other number
        if two or values.max() == 1:
            return marked
    found: NDArray[np.bool_] = np.asarray(_in_8_bits(image, name).convert("L")) >= 128
    return found


def _in_8_bits(image: Image.Image, name: str) -> Image.Image:
    """An image whose channels have 8 bits; grey ones with more are scaled, where `convert` would
    cut them off at 255. Raises UsageError where it is not known what white is."""
    if image.mode == "La":  # no other mode can be made of it
        return image.convert("LA")
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:  # nor where one is not a number
            raise UsageError(
                f"{name} has floating-point pixels from {low:g} to {high:g}, expected 0 (black) to "
                "1 (white): scale them, or save the picture with 8 bits a channel"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image, np.int64)
    # Pillow before 11 gives the 16 bits of a PNG as 32
    if image.mode == "I" and (image.format != "PNG" or values.min() < 0 or values.max() > 65535):
        raise UsageError(
            f"{name} has 32-bit pixels from {values.min()} to {values.max()}, of which white is "
            "not known: save the picture with 8 or 16 bits a channel"
        )
    grey = Image.fromarray((values // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the number of 16 bits that is transparent
        grey.putalpha(Image.fromarray(255 * (values != clear).astype(np.uint8)))
    return grey


def fit(
    image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """side × side pixels: the short side resized to round(1.125 · side), then the centre.

    An image of this very size stays as it is.
    """
    if image.size == (side, side):
        return image
    short = min(image.size)
    image = _strip(image, 1.0)
    target = round(MARGIN * side)
    size = [target if n == short else int(target * n / short) for n in image.size]
    return _centre(image.resize((size[0], size[1]), resample), side, side)


def _strip(image: Image.Image, ratio: float) -> Image.Image:
    """The middle of a long strip, of which no more can be seen in a frame of this width over
    height; all of it, resized, might fill the memory."""
    width = min(image.width, max(1, round(2 * image.height * ratio)))
    height = min(image.height, max(1, round(2 * image.width / ratio)))
    return _centre(image, width, height)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _opened(picture: Picture | Mask) -> Image.Image:
    """Read whole, and upright."""
    if isinstance(picture, np.ndarray):
        array = picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
        fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
        if array.dtype != np.uint8 or not fits or not array.size:
            raise UsageError(
                f"a picture is uint8 [H, W] or [H, W, 1, 3 or 4], found {picture.dtype} "
                f"{list(picture.shape)}"
            )
        return Image.fromarray(np.ascontiguousarray(array))
    named = _name(picture)
    try:
        if isinstance(picture, Image.Image):
            return _turned(picture)
        with warnings.catch_warnings():  # of its size, which is looked at below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(picture)
        with opened:
            return _turned(opened)
    except Image.DecompressionBombError:
        raise UsageError(f"{named} has more than {MAX_PIXELS // 10**6} million pixels") from None
    except FileNotFoundError:
        raise UsageError(f"{named} does not exist") from None
    except Exception as error:  # a damaged file raises whatever its decoder stumbles over
        why = getattr(error, "strerror", None) or "it is no image, or a damaged one"
        raise UsageError(f"{named} cannot be read: {why}") from None


def _name(picture: Picture | Mask) -> str:
    """What a message calls it."""
    if isinstance(picture, (Image.Image, np.ndarray)):
        return "the picture"
    return os.fspath(picture)


def _turned(image: Image.Image) -> Image.Image:
    """A copy in memory."""
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # which says of some modes how they are meant
    return turned


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
