"""`encode`, `reconstruct` and `edit` over a small model: what the pipeline does, as files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli_steps import SIDE, done, edit, pixels, refused, run
from var_deploy.image.editing import box_mask
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline

pytest.importorskip("torch")

SCALES, LENGTHS = 3, [1, 4, 16]
WIDTH, HEIGHT = 30, 20  # of the picture
BOX = (12, 2, 22, 18)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of another size and mode than the model's."""
    array = np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture(scope="module")
def pipe(made: Path) -> Iterator[Pipeline]:
    with Pipeline.load(made) as pipeline:
        yield pipeline


def cells(path: Path) -> np.ndarray:
    """A grid's images, [rows, columns, SIDE, SIDE, 3]."""
    sheet, step = pixels(path), SIDE + 2
    rows, columns = ((n + 2) // step for n in sheet.shape[:2])
    return np.stack(
        [
            [sheet[y * step :, x * step :][:SIDE, :SIDE] for x in range(columns)]
            for y in range(rows)
        ]
    )


# encode, reconstruct


def test_tokens_as_a_file(made: Path, pipe: Pipeline, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "t.npz"
    said = done("encode", made, picture, "--out", out).stdout
    assert said.startswith(f"wrote {out} (21 tokens of 3 scales, ")
    with np.load(out) as found:
        assert sorted(found) == ["tokens_00", "tokens_01", "tokens_02"]
        for name, expected in zip(sorted(found), pipe.encode(picture), strict=True):
            np.testing.assert_array_equal(found[name], expected)
    before = out.read_bytes()
    report = json.loads(done("encode", made, picture, "--out", out, "--json").stdout)
    assert (report["tokens"], report["runtime"]["precision"]) == (LENGTHS, "fp32")
    assert out.read_bytes() == before, "the same tokens are the same bytes"


def test_a_strip_of_the_first_scales(
    made: Path, pipe: Pipeline, picture: Path, tmp_path: Path
) -> None:
    done("encode", made, picture, "--out", tmp_path / "t.npz")
    tokens = pipe.encode(picture)
    for source in (picture, tmp_path / "t.npz"):
        said = done("reconstruct", made, source, "--out", tmp_path / "strip.png").stdout
        assert said.startswith(f"wrote {tmp_path}/strip.png (from 1,2,3 of 3 scales, ")
        found = cells(tmp_path / "strip.png")
        assert found.shape[:2] == (1, SCALES)
        for k in range(SCALES):
            np.testing.assert_array_equal(found[0, k], pipe.decode(tokens, scales=k + 1)[0])
        text = read_settings(tmp_path / "strip.png")
        assert text["bundle"] == read_manifest(made).digest()
        assert (text["picture"], text["scales"]) == (source.name, "1,2,3 of 3")


@pytest.mark.parametrize(
    ("scales", "counts"),
    [("2", [2]), ("K", [3]), ("1, k", [1, 3]), ("2..K", [2, 3]), ("3,1..2", [3, 1, 2])],
)
def test_scales_are_chosen(
    made: Path, pipe: Pipeline, tmp_path: Path, scales: str, counts: list[int]
) -> None:
    """Of two images at once: a row each."""
    drawn = np.random.default_rng(6)
    tokens = [drawn.integers(0, 48, (2, length)) for length in LENGTHS]
    np.savez(tmp_path / "t.npz", **{f"tokens_{k:02d}": t for k, t in enumerate(tokens)})
    arguments = ("--scales", scales, "--out", tmp_path / "s.png", "--json")
    report = json.loads(done("reconstruct", made, tmp_path / "t.npz", *arguments).stdout)
    assert report["scales"] == counts
    found = cells(tmp_path / "s.png")
    assert found.shape[:2] == (2, len(counts))
    for column, count in enumerate(counts):
        np.testing.assert_array_equal(found[:, column], pipe.decode(tokens, scales=count))


def test_one_scale_of_one_image_is_an_image(made: Path, picture: Path, tmp_path: Path) -> None:
    options = ("--scales", "3", "--out", tmp_path / "s.png", "--quiet")
    assert done("reconstruct", made, picture, *options).stdout == ""
    assert pixels(tmp_path / "s.png").shape == (SIDE, SIDE, 3)


# edit


def masks(folder: Path, new: np.ndarray) -> tuple[Path, Path]:
    """White on black, and as transparency."""
    white, clear = folder / "white.png", folder / "clear.png"
    Image.fromarray(255 * new.astype(np.uint8)).save(white)
    holes = np.full((*new.shape, 4), 90, np.uint8)
    holes[..., 3] = np.where(new, 0, 255)
    Image.fromarray(holes).save(clear)
    return white, clear


@pytest.mark.parametrize("outside", [False, True])
def test_box_and_masks_ask_for_the_same(
    made: Path, pipe: Pipeline, picture: Path, tmp_path: Path, outside: bool
) -> None:
    white, clear = masks(tmp_path, box_mask(BOX, HEIGHT, WIDTH))
    settings = {"label": 3, "seed": [4], "cfg": 1.5, "top_k": 20}
    new = box_mask(BOX, HEIGHT, WIDTH, outside)
    expected = pipe.edit(picture, new, **settings)  # type: ignore[arg-type]
    given = ("--label", 3, "--seed", 4, "--cfg", 1.5, "--top-k", 20, "--out", tmp_path / "e.png")
    for where in (("--box", ",".join(map(str, BOX))), ("--mask", white), ("--mask", clear)):
        done("edit", made, picture, *where, *(["--outside"] if outside else []), *given)
        np.testing.assert_array_equal(pixels(tmp_path / "e.png"), expected[0])
    other = pipe.edit(picture, ~new, **settings)  # type: ignore[arg-type]
    assert (other != expected).any()


def test_several_edits_and_each_alone(
    made: Path, pipe: Pipeline, picture: Path, tmp_path: Path
) -> None:
    """--count takes the seeds that follow; without a label there is no class."""
    where = ("--box", "12,2,22,18")
    out = tmp_path / "many"
    said = done("edit", made, picture, *where, "--seed", 7, "--count", 3, "--out", out).stdout
    assert said.startswith(f"wrote {out} (3 images of 8 × 8, ")
    assert sorted(p.name for p in out.iterdir()) == ["000.png", "001.png", "002.png"]
    expected = pipe.edit(picture, box_mask(BOX, HEIGHT, WIDTH), seed=[7, 8, 9])
    for n, path in enumerate(sorted(out.iterdir())):
        np.testing.assert_array_equal(pixels(path), expected[n])
        text = read_settings(path)
        assert (text["seed"], text["labels"], text["box"]) == (str(7 + n), "none", "12,2,22,18")
        one = ("--box", text["box"], "--seed", text["seed"], "--cfg", text["cfg"])
        done("edit", made, picture, *one, "--out", tmp_path / "one.png")
        np.testing.assert_array_equal(pixels(tmp_path / "one.png"), expected[n])
    done("edit", made, picture, *where, "--seed", "9,7", "--out", tmp_path / "grid.png")
    np.testing.assert_array_equal(cells(tmp_path / "grid.png")[0], expected[[2, 0]])


def test_pixels_are_kept_on_request(made: Path, tmp_path: Path) -> None:
    array = np.random.default_rng(7).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "p.png")
    request = ("--box", "4,0,8,8", "--keep-pixels", "--out", tmp_path / "e.png", "--json")
    report = json.loads(done("edit", made, tmp_path / "p.png", *request).stdout)
    found = pixels(tmp_path / "e.png")
    np.testing.assert_array_equal(found[:, :4], array[:, :4])
    assert (found[:, 4:] != array[:, 4:]).any()
    text = read_settings(tmp_path / "e.png")
    assert report["settings"].keys() - {"label_names"} == text.keys()
    assert report["settings"]["keep_pixels"] is True and text["keep_pixels"] == "yes"
    assert report["settings"]["box"] == [4, 0, 8, 8]
    assert report["settings"]["labels"] == [None], "nobody named a class"
    assert report["settings"]["picture"] == "p.png", "no path of this machine"


def test_a_class_by_name(named: Path, tmp_path: Path) -> None:
    picture, name = tmp_path / "p.png", read_manifest(named).labels[4]
    Image.new("RGB", (64, 64), (200, 40, 90)).save(picture)
    request = ("edit", named, picture, "--box", "8,8,56,56")
    done(*request, "--label", name, "--out", tmp_path / "many/")
    done(*request, "--label", 4, "--out", tmp_path / "number.png")
    (path,) = (tmp_path / "many").iterdir()
    assert path.name == f"000_{name}.png"
    assert read_settings(path)["labels"] == f"4 {name}"
    np.testing.assert_array_equal(pixels(path), pixels(tmp_path / "number.png"))
    done(*request, "--label", "none", "--out", tmp_path / "none.png")
    done(*request, "--out", tmp_path / "left-out.png")
    assert (tmp_path / "none.png").read_bytes() == (tmp_path / "left-out.png").read_bytes()
    said = refused(2, *request, "--label", name + "s", "--out", tmp_path / "x.png")
    assert f"did you mean {name}" in said


# what is refused, before anything is loaded


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("the bundle was loaded")

    monkeypatch.setattr(Pipeline, "load", load)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("encode", "none.png", "--out", "t.npz"), "none.png does not exist"),
        (("encode", "text.txt", "--out", "t.npz"), "text.txt cannot be read: it is no image"),
        (("encode", "picture.png", "--out", "t.png"), "tokens are written as .npz, found t.png"),
        (("encode", "picture.png", "--out", "d.npz"), "d.npz is not an ordinary file"),
        (("reconstruct", "picture.png", "--out", "s.npz"), "images are written as .png"),
        (("reconstruct", "picture.png", "--out", "s"), "images are written as .png"),
        (("reconstruct", "text.npz", "--out", "s.png"), "it is no file of tokens, or a damaged"),
        (("reconstruct", "none.npz", "--out", "s.png"), "none.npz does not exist"),
        (("reconstruct", "array.npz", "--out", "s.png"), "cannot be read"),
        (("reconstruct", "other.npz", "--out", "s.png"), "other.npz holds no tokens"),
        (("reconstruct", "short.npz", "--out", "s.png"), "between 1 and 1, found 3"),
        (("reconstruct", "wrong.npz", "--out", "s.png", "--scales", "1"), "between 0 and 47"),
        *[
            (("reconstruct", "picture.png", "--out", "s.png", "--scales", scales), part)
            for scales, part in {
                "0": "1 to 3, found 0",
                "1,4": "1 to 3, found 4",
                "3..1": "3..1 runs backwards",
                "": "no number of scales",
                "1..": "no number of scales",
                "²": "no number of scales",
            }.items()
        ],
        *[
            (("edit", "picture.png", "--out", "e.png", *options), part)
            for options, part in {
                (): "--mask or with --box",
                ("--box", "0,0,9,9", "--mask", "picture.png"): "one of them",
                ("--box", "1,2,3"): "four whole numbers x0,y0,x1,y1, found '1,2,3'",
                ("--box", "a,b,c,d"): "four whole numbers",
                ("--box", "0,0,31,9"): "must lie in the image of 30 × 20",
                ("--box", "9,9,9,12"): "x0 < x1",
                ("--box", "0,0,1,1"): "marks nothing",  # it is cropped away
                ("--box", "0,0,30,20", "--outside"): "marks nothing",
                ("--mask", "small.png"): "the mask has 3 × 3 pixels, expected",
                ("--mask", "text.txt"): "it is no image",
                ("--box", "9,9,20,18", "--label", "5"): "0 to 4",
                ("--box", "9,9,20,18", "--seed", "1,2", "--count", "3"): "2 seeds for 3 images",
                ("--box", "9,9,20,18", "--seed", str(2**64 - 1), "--count", "2"): "2**64 - 1",
                ("--box", "9,9,20,18", "--top-p", "2"): "top_p",
            }.items()
        ],
    ],
)
def test_bad_requests(
    made: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: Callable[[], None],
    unloaded: None,
    arguments: tuple[str, ...],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.npz").mkdir()
    Path("text.txt").write_text("no image")
    Path("text.npz").write_text("no tokens")
    with Path("array.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    np.savez("other.npz", other=np.zeros(3))
    np.savez("short.npz", tokens_00=np.zeros((1, 1), int), tokens_02=np.zeros((1, 16), int))
    np.savez("wrong.npz", tokens_00=np.full((1, 1), 48))
    Image.new("L", (3, 3), 255).save("small.png")
    unchanged()
    command, image, *options = arguments
    refused(2, command, made, image, *options, parts=(part,))


@pytest.mark.parametrize("options", [(), ("--keep-pixels",), ("--count", "2")])
def test_an_edit_that_changes_no_token(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: Callable[[], None],
    unloaded: None,
    options: tuple[str, ...],
) -> None:
    """Two of four pixels of a token are not more than half."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (SIDE, SIDE), "red").save("p.png")
    unchanged()
    where = ("--box", "2,2,3,4", "--out", "e.png")
    said = refused(1, "edit", made, "p.png", *where, *options)
    assert "too small to change anything" in said and "2 × 2 pixels" in said


@pytest.mark.parametrize(
    ("graph", "commands"),
    [("encoder", ("encode", "reconstruct", "edit")), ("accumulate", ("reconstruct",))],
)
def test_a_bundle_from_before(
    bundle: Path, picture: Path, unloaded: None, graph: str, commands: tuple[str, ...]
) -> None:
    def drop(data: dict[str, Any]) -> None:
        del data["graphs"]["fp32"][graph]

    edit(bundle, drop)
    for command in commands:
        options = {"encode": ("--out", "t.npz"), "edit": ("--box", "9,9,20,18", "--out", "e.png")}
        arguments = options.get(command, ("--out", "s.png"))
        refused(1, command, bundle, picture, *arguments, parts=(f"no graph {graph} in fp32",))


def test_a_precision_that_is_not_there(made: Path, picture: Path, unloaded: None) -> None:
    options = ("--out", "t.npz", "--precision", "int8")
    refused(1, "encode", made, picture, *options, parts=("no int8 graphs (it has fp32)",))


# Ctrl-C


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("encode", ("--out", "t.npz")),
        ("reconstruct", ("--out", "s.png")),
        ("edit", ("--box", "9,9,20,18", "--count", "3", "--out", "e.png")),
        ("edit", ("--box", "9,9,20,18", "--count", "3", "--out", "many")),
    ],
)
@pytest.mark.parametrize("when", ["drawing", "writing"])
def test_ctrl_c_leaves_nothing(
    made: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: Callable[[], None],
    command: str,
    options: tuple[str, ...],
    when: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.png").write_bytes(b"old")

    def interrupt(*arguments: Any, **given: Any) -> None:
        if when == "writing" and not isinstance(arguments[0], Pipeline):
            next(a for a in arguments if hasattr(a, "write")).write(b"half")
        raise KeyboardInterrupt

    if when == "drawing":
        monkeypatch.setattr(Pipeline, {"edit": "edit"}.get(command, "encode"), interrupt)
    else:
        monkeypatch.setattr(np, "savez", interrupt)
        monkeypatch.setattr(Image.Image, "save", interrupt)
    unchanged()
    result = run(command, made, picture, *options)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
