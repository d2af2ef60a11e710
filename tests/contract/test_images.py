"""Grids and PNG files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from var_deploy import files
from var_deploy.errors import UsageError, VarDeployError
from var_deploy.image import images
from var_deploy.manifest import read_manifest


@pytest.fixture
def pictures() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("columns", "rows", "wide"), [(None, 2, 3), (1, 5, 1), (5, 1, 5), (9, 1, 5)]
)
def test_grid_places_every_image(
    pictures: NDArray[np.uint8], columns: int | None, rows: int, wide: int
) -> None:
    sheet = images.grid(pictures, columns, gap=2)
    assert sheet.shape == (rows * 6 - 2, wide * 8 - 2, 3)
    covered = np.zeros(sheet.shape[:2], bool)
    for n, picture in enumerate(pictures):
        top, left = n // wide * 6, n % wide * 8
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 6], picture)
        covered[top : top + 4, left : left + 6] = True
    assert (sheet[~covered] == images.BACKGROUND).all()


def test_grid_of_nothing_is_refused(pictures: NDArray[np.uint8]) -> None:
    with pytest.raises(UsageError, match=r"found shape \(0, 4, 6, 3\)"):
        images.grid(pictures[:0])
    with pytest.raises(UsageError, match="column"):
        images.grid(pictures, 0)


def test_png_keeps_pixels_and_settings(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    path = tmp_path / "new" / "x.png"
    text = {"seed": "7", "labels": "0 star, 3 Bäume 木", "cfg": "1.5"}
    images.save_png(path, pictures[0], text)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), pictures[0])
    assert images.read_settings(path) == text
    assert [p.name for p in path.parent.iterdir()] == ["x.png"], "no temporary file stays"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode, "others may read it, as any new file"


def test_a_grey_image(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    images.save_png(tmp_path / "g.png", pictures[0, ..., :1], {})
    with Image.open(tmp_path / "g.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pictures[0, ..., 0])


def test_a_link_is_followed(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    (tmp_path / "link.png").symlink_to("real.png")
    images.save_png(tmp_path / "link.png", pictures[0], {})
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").is_file()


def test_a_full_disk_keeps_the_old_image(
    tmp_path: Path, pictures: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    images.save_png(path, pictures[0], {})
    before = path.read_bytes()

    def no_space(self: Image.Image, stream: object, **options: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Image.Image, "save", no_space)
    with pytest.raises(VarDeployError, match="No space left"):
        images.save_png(path, pictures[1], {})
    with pytest.raises(VarDeployError, match="No space left"):
        images.save_folder(tmp_path / "many", ["0.png"], pictures[:1], [{}])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_a_file_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.bin"
    with files.whole_file(path) as stream:
        stream.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    for failure in (KeyboardInterrupt, UsageError):
        with pytest.raises(failure), files.whole_file(path) as stream:
            stream.write(b"half")
            raise failure
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


@pytest.mark.parametrize(("count", "channels"), [(5, 3), (5, 1), (1, 3)])
def test_a_gif_repeats_its_frames(
    tmp_path: Path, pictures: NDArray[np.uint8], count: int, channels: int
) -> None:
    frames, milliseconds = pictures[:count, ..., :channels], [100, 200, 300, 400, 1500][:count]
    images.save_gif(tmp_path / "new" / "x.gif", frames, milliseconds)
    with Image.open(tmp_path / "new" / "x.gif") as image:
        found = [
            (frame.info["duration"], np.asarray(frame.convert("RGB")))
            for frame in ImageSequence.Iterator(image)
        ]
        assert image.info["loop"] == 0
    assert [duration for duration, _ in found] == milliseconds
    for (_, shown), frame in zip(found, frames, strict=True):
        np.testing.assert_array_equal(shown, np.broadcast_to(frame, shown.shape))


def test_text_that_is_no_text(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    name = os.fsdecode(b"p\xff.png")
    images.save_png(tmp_path / "x.png", pictures[0], {"picture": name})
    assert images.read_settings(tmp_path / "x.png") == {"picture": "p?.png"}


def test_the_text_of_an_image_names_what_made_it(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    text = images.settings_text(manifest, "fp32", manifest.defaults, [3, 5])
    assert text == {
        **images.origin_text(manifest, "fp32"),
        "seed": "3,5",
        "cfg": "2",
        "top_k": "3",
        "top_p": "0.95",
        "temperature": "1",
    }
    assert text["bundle"] == manifest.digest() and text["Software"].startswith("var-deploy ")


def test_a_folder_comes_whole(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    folder = tmp_path / "new" / "many"
    names = [f"{n}.png" for n in range(5)]
    images.save_folder(folder, names, pictures, [{"image": str(n)} for n in range(5)])
    assert sorted(p.name for p in folder.iterdir()) == names
    assert [p.name for p in folder.parent.iterdir()] == ["many"]
    assert images.read_settings(folder / "3.png") == {"image": "3"}

    (folder / "mine.txt").touch()
    images.save_folder(folder, names, pictures[::-1], [{}] * 5)
    assert sorted(p.name for p in folder.iterdir()) == [*names, "mine.txt"]
    with Image.open(folder / "0.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pictures[4])


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b" / "x.png")
    files.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.png").write_bytes(b"old")
    files.check_writable(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"old"


def test_check_writable_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        files.check_writable(tmp_path / "file" / "x.png")
    with pytest.raises(UsageError, match="cannot be written"):
        files.check_writable(Path("/proc/self/x.png"))


def test_a_folder_or_device_is_not_overwritten(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(UsageError, match="not an ordinary file"):
            images.save_png(path, pictures[0], {})
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_suffix_chooses_the_format(
    tmp_path: Path, pictures: NDArray[np.uint8], suffix: str, channels: int
) -> None:
    path = tmp_path / f"x{suffix}"
    text = {"Software": "var-deploy", "labels": "3 étoile, 星", "n": "1"}
    picture = np.repeat(np.repeat(pictures[0, ..., :channels], 8, 0), 8, 1)
    images.save_image(path, picture, text)
    assert images.read_settings(path) == text
    with Image.open(path) as image:
        assert image.format == {".jpg": "JPEG", ".jpeg": "JPEG"}.get(
            suffix.lower(), suffix[1:].upper()
        )
        mode = "RGB" if channels == 3 else "L"
        found = np.asarray(image.convert(mode)).reshape(picture.shape)
        if image.format == "JPEG":
            assert image.getexif()[0x0131] == "var-deploy"
            assert np.abs(found.astype(int) - picture).mean() < 4
        else:
            np.testing.assert_array_equal(found, picture)


def test_formats_that_cannot_be_written(
    tmp_path: Path, pictures: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.jpg, \.jpeg or \.webp, found x\.bmp"):
        images.save_image(tmp_path / "x.bmp", pictures[0], {})
    monkeypatch.setattr(images.features, "check", lambda feature: False)
    with pytest.raises(UsageError, match=r"cannot write WebP, found x\.webp: name x\.png"):
        images.image_format(tmp_path / "x.webp")
    assert images.image_format(tmp_path / "x.jpg") == "JPEG"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "comment", [b"", b"UNICODE\0{}", b"ASCII\0\0\0a holiday", b"ASCII\0\0\0[1]", 7]
)
def test_comments_of_other_programs_are_no_settings(tmp_path: Path, comment: object) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
    assert images.read_settings(tmp_path / "x.jpg") == {}


def test_reading_settings_of_other_files(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    Image.fromarray(pictures[0]).save(tmp_path / "x.bmp")
    for name, message in [("x.png", "no.*PNG"), ("x.bmp", "BMP, not PNG"), ("y.png", "No such")]:
        with pytest.raises(UsageError, match=message):
            images.read_settings(tmp_path / name)
