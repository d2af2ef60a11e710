"""Pictures of any size and mode, brought to what a model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from var_deploy.errors import UsageError
from var_deploy.image import pictures
from var_deploy.image.pictures import fit, read_mask, read_pictures, upright

SIDE = 64
RANDOM = np.random.default_rng(3)
PIXELS = RANDOM.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def one(picture: Any, channels: int = 3) -> Any:
    found = read_pictures(picture, SIDE, channels)
    assert found.shape == (1, SIDE, SIDE, channels) and found.dtype == np.uint8
    return found[0]


def test_a_picture_of_the_models_own_size_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    Image.fromarray(PIXELS).save(path)
    for same in (PIXELS, Image.fromarray(PIXELS), path, str(path)):
        np.testing.assert_array_equal(one(same), PIXELS)
    several = read_pictures([path, PIXELS], SIDE, 3)
    np.testing.assert_array_equal(several, read_pictures(np.stack([PIXELS, PIXELS]), SIDE, 3))


def test_resized_as_in_training() -> None:
    """The short side to 72 (1.125 · 64) with a Lanczos filter, then the centre."""
    large = Image.fromarray(RANDOM.integers(0, 256, (150, 211, 3), np.uint8))
    whole = large.resize((int(72 * 211 / 150), 72), Image.Resampling.LANCZOS)
    left = round((whole.width - SIDE) / 2)
    expected = whole.crop((left, 4, left + SIDE, 4 + SIDE))
    np.testing.assert_array_equal(np.asarray(fit(large, SIDE)), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (20_000, 2), (65, 64)])
def test_any_size(size: tuple[int, int]) -> None:
    found = one(Image.new("RGB", size, (10, 200, 30)))
    assert (found == (10, 200, 30)).all()


def test_alpha_goes_over_white() -> None:
    clear = np.zeros((SIDE, SIDE, 4), np.uint8)
    clear[:, :32] = (200, 0, 0, 255)
    found = one(clear)
    assert (found[:, :32] == (200, 0, 0)).all() and (found[:, 32:] == 255).all()
    grey = one(Image.fromarray(clear).convert("LA"))
    assert (grey[:, 32:] == 255).all() and (grey[:, :32] < 100).all()
    palette = Image.fromarray(clear[..., :3]).convert("P")
    palette.info["transparency"] = palette.getpixel((63, 0))
    assert (one(palette)[:, 32:] == 255).all()


def test_grey_pictures_and_grey_models() -> None:
    grey = PIXELS[..., 0]
    for shape in (grey, grey[..., None]):
        np.testing.assert_array_equal(one(shape), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(one(grey, channels=1)[..., 0], grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(one(deep)[..., 1], grey)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "HSV", "YCbCr"])
def test_other_modes(mode: str) -> None:
    assert one(Image.fromarray(PIXELS).convert(mode)).std() > 10


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_floats_from_black_to_white(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    floats = Image.fromarray(grey.astype(np.float32) / 255)
    for picture in (floats, saved(floats, tmp_path / "f.tif")):
        np.testing.assert_array_equal(one(picture)[..., 2], grey)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits(tmp_path: Path, order: str) -> None:
    grey = PIXELS[..., 0]
    deep = Image.fromarray((grey.astype(np.uint16) * 257).astype(order))
    for picture in (deep, saved(deep, tmp_path / "d.tif")):
        np.testing.assert_array_equal(one(picture)[..., 1], grey)
    if order == "<u2":
        np.testing.assert_array_equal(one(saved(deep, tmp_path / "d.png"))[..., 0], grey)


def test_sixteen_bits_of_which_one_is_transparent(tmp_path: Path) -> None:
    deep = np.full((SIDE, SIDE), 30_000, np.uint16)
    deep[:, :32] = 500
    path = saved(Image.fromarray(deep), tmp_path / "t.png", transparency=500)
    found = one(path)
    assert (found[:, :32] == 255).all() and (found[:, 32:] == 30_000 // 257).all()


def test_premultiplied_grey() -> None:
    assert (one(Image.new("La", (SIDE, SIDE), (100, 200))) > 100).all()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.linspace(0, 255, 4096, dtype=np.float32), "floating-point pixels from 0 to 255, exp"),
        (np.linspace(-1, 1, 4096, dtype=np.float32), "floating-point pixels from -1 to 1, expect"),
        (np.r_[np.zeros(4095), np.nan].astype(np.float32), "from nan to nan, expected 0"),
        (np.r_[np.zeros(4095), np.inf].astype(np.float32), "from 0 to inf, expected 0"),
        (np.arange(4096, dtype=np.int32) * 2**19, "32-bit pixels from 0 to 2146959360, of which"),
        (np.arange(4096, dtype=np.int32) % 256, "32-bit pixels from 0 to 255, of which white is"),
        (-np.arange(4096, dtype=np.int32), "32-bit pixels from -4095 to 0, of which white is not"),
    ],
)
def test_pixels_whose_white_is_not_known(tmp_path: Path, array: Any, said: str) -> None:
    picture = Image.fromarray(array.reshape(SIDE, SIDE))
    for given, name in ((picture, "the picture"), (saved(picture, tmp_path / "p.tif"), "p.tif")):
        with pytest.raises(UsageError, match=f"{name} has .*{said}"):
            one(given)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_frame_of_several(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    path = tmp_path / f"several.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert (one(path) == (255, 0, 0)).all()


def test_a_photograph_is_turned_as_its_exif_tag_says(tmp_path: Path) -> None:
    sideways = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    sideways[:, :SIDE] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(sideways).save(tmp_path / "p.png", exif=exif)
    found = upright(tmp_path / "p.png")
    assert found.size == (SIDE, 2 * SIDE)
    assert np.asarray(found)[:SIDE].mean() == 255 and not np.asarray(found)[SIDE:].any()


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (PIXELS.astype(np.float32), r"uint8 \[H, W\].*float32 \[64, 64, 3\]"),
        (PIXELS[..., :2], r"found uint8 \[64, 64, 2\]"),
        (PIXELS[:0], r"found uint8 \[0, 64, 3\]"),
        ([], "no picture given"),
    ],
)
def test_arrays_that_are_no_pictures(picture: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_pictures(picture, SIDE, 3)


def test_files_that_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        one(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"text\.png cannot be read: it is no image"):
        one(tmp_path / "text.png")
    Image.fromarray(PIXELS).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=r"half\.png cannot be read"):
        one(tmp_path / "half.png")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(UsageError, match=r"whole\.png has more than"):
        one(tmp_path / "whole.png")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """100 million pixels in a few kilobytes."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UsageError, match="more than 80 million pixels"):
        one(tmp_path / "bomb.png")


# masks


def test_masks_say_where_the_image_is_new(tmp_path: Path) -> None:
    new = np.zeros((SIDE, SIDE), np.bool_)
    new[:, 40:] = True
    white = Image.fromarray(255 * new.astype(np.uint8))
    white.save(tmp_path / "mask.png")
    holes = np.full((SIDE, SIDE, 4), 77, np.uint8)
    holes[..., 3] = np.where(new, 0, 255)
    for mask in (new, white, tmp_path / "mask.png", white.convert("1"), Image.fromarray(holes)):
        np.testing.assert_array_equal(read_mask(mask, 90, 70, SIDE), new)
        np.testing.assert_array_equal(read_mask(mask, 90, 70, SIDE, outside=True), ~new)


@pytest.mark.parametrize("value", [1, 20, 127, 255])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
def test_masks_of_two_values(tmp_path: Path, value: int, kind: Any) -> None:
    """0 and the number of a class, as programs that segment pictures write them."""
    new = np.zeros((SIDE, SIDE), np.bool_)
    new[:, 40:] = True
    image = Image.fromarray((value * new).astype(kind))
    for mask in (image, saved(image, tmp_path / "mask.tif")):
        np.testing.assert_array_equal(read_mask(mask, SIDE, SIDE, SIDE), new)
        np.testing.assert_array_equal(read_mask(mask, SIDE, SIDE, SIDE, outside=True), ~new)


def test_masks_of_a_palette(tmp_path: Path) -> None:
    """Of which number 1 is dark red, as in the pictures of PASCAL VOC."""
    new = np.zeros((SIDE, SIDE), np.uint8)
    new[:, 40:] = 1
    image = Image.fromarray(new)
    image.putpalette([0, 0, 0, 128, 0, 0])
    path = saved(image, tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(path, SIDE, SIDE, SIDE), new > 0)


def test_masks_of_one_value() -> None:
    for value, kind in ((1, np.uint8), (255, np.uint8), (1, np.float32)):
        image = Image.fromarray(np.full((SIDE, SIDE), value, kind))
        assert read_mask(image, SIDE, SIDE, SIDE).all()
    black = Image.new("L", (SIDE, SIDE))
    assert read_mask(black, SIDE, SIDE, SIDE, outside=True).all()


def test_a_mask_of_many_classes_is_refused(tmp_path: Path) -> None:
    image = Image.fromarray((np.arange(SIDE * SIDE) % 21).reshape(SIDE, SIDE).astype(np.uint8))
    with pytest.raises(UsageError, match=r"mask\.png marks nothing: its brightest pixel is 20 of"):
        read_mask(saved(image, tmp_path / "mask.png"), SIDE, SIDE, SIDE)
    with pytest.raises(UsageError, match="the mask has 32-bit pixels from 0 to 20"):
        read_mask(Image.fromarray(np.asarray(image, np.int32)), SIDE, SIDE, SIDE)


def test_a_mask_follows_its_picture() -> None:
    picture = np.zeros((150, 211, 3), np.uint8)
    picture[40:110, 60:150] = 255
    new = picture[..., 0] > 0
    seen = read_pictures(picture, SIDE, 3)[0, ..., 0] >= 128
    found = read_mask(new, 211, 150, SIDE)
    assert (found != seen).mean() < 0.01 and found.any()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((SIDE, SIDE), np.bool_), "marks nothing"),
        (np.ones((10, 20), np.bool_), "the mask has 20 × 10 pixels, expected .* 90 × 70"),
        (np.ones((SIDE, SIDE), np.uint8), r"a mask is bool \[H, W\], found uint8"),
    ],
)
def test_masks_that_are_none(mask: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_mask(mask, 90, 70, SIDE)
