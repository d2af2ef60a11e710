"""`generate --preview`, `--gif` and `--deadline`: how images came about, and how far they came."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from cli_steps import SIDE, done, pixels, refused, run
from var_deploy.cli.filmstrip import LAST_MS, SCALE_MS, Filmstrip
from var_deploy.cli.outputs import GeneratedImages
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import ScaleEvent

pytest.importorskip("torch")

SCALES, STEP = 3, SIDE + 2
REQUEST = ("--labels", "4,2", "--count", 3, "--seed", 11)


def cell(path: Path, row: int, column: int) -> np.ndarray:
    return pixels(path)[row * STEP :, column * STEP :][:SIDE, :SIDE]


def test_a_strip_of_how_images_appear(made: Path, tmp_path: Path) -> None:
    plain, out, strip = tmp_path / "plain.png", tmp_path / "many", tmp_path / "deep" / "strip.png"
    done("generate", made, *REQUEST, "--out", plain)
    said = done("generate", made, *REQUEST, "--preview", strip, "--out", out).stdout
    assert said.splitlines()[1] == f"wrote {strip} (after each of 3 scales)"
    assert pixels(strip).shape == (3 * STEP - 2, SCALES * STEP - 2, 3)
    assert read_settings(strip) == read_settings(plain)

    tokens: list[list[Any]] = [[], [], []]
    with Pipeline.load(made) as pipe:
        pipe.generate([4, 2, 4], seed=11, on_scale=lambda e: tokens[e.scale].append(e.tokens))
        drawn = [np.concatenate(parts) for parts in tokens]
        for k in range(SCALES - 1):
            for n, expected in enumerate(pipe.decode(drawn, scales=k + 1)):
                # by another graph than the preview
                assert np.abs(cell(strip, n, k).astype(int) - expected).max() <= 1
    for n, path in enumerate(sorted(out.iterdir())):
        np.testing.assert_array_equal(cell(strip, n, SCALES - 1), pixels(path))
        top, left = n // 2 * STEP, n % 2 * STEP
        one = pixels(plain)[top : top + SIDE, left : left + SIDE]
        np.testing.assert_array_equal(pixels(path), one, "looking on changes nothing")


def test_a_gif_of_how_images_appear(made: Path, tmp_path: Path) -> None:
    out, gif, strip = (tmp_path / name for name in ("x.png", "x.gif", "strip.png"))
    files = ("--out", out, "--gif", gif, "--preview", strip)
    report = json.loads(done("generate", made, *REQUEST, *files, "--json").stdout)
    assert [report[key] for key in ("out", "gif", "preview")] == [str(out), str(gif), str(strip)]
    with Image.open(gif) as image:
        assert image.size == pixels(out).shape[1::-1]
        assert image.info["loop"] == 0
        frames = [
            (frame.info["duration"], np.asarray(frame.convert("RGB")).astype(int))
            for frame in ImageSequence.Iterator(image)
        ]
    assert [duration for duration, _ in frames] == [SCALE_MS] * (SCALES - 1) + [LAST_MS]
    assert np.abs(frames[-1][1] - pixels(out)).mean() < 4, "but for the 256 colours"
    for k, (_, frame) in enumerate(frames):
        assert np.abs(frame[:SIDE, :SIDE] - cell(strip, 0, k)).mean() < 4


def test_a_deadline_that_leaves_time_for_one_scale(made: Path, tmp_path: Path) -> None:
    out, strip = tmp_path / "x.png", tmp_path / "strip.png"
    files = ("--out", out, "--preview", strip, "--deadline", 1e-9)
    said = done("generate", made, *REQUEST, *files).stdout
    assert said.splitlines()[-1] == "images 0 to 2: 1 of 3 scales"
    assert read_settings(out)["scales_done"] == "1,1,1 of 3"
    for n in range(3):
        top, left = n // 2 * STEP, n % 2 * STEP
        shown = pixels(out)[top : top + SIDE, left : left + SIDE]
        np.testing.assert_array_equal(cell(strip, n, 0), shown)
        for k in range(1, SCALES):
            assert (cell(strip, n, k) == 255).all(), "there was no such scale"


def test_a_deadline_that_leaves_time_for_all(made: Path, tmp_path: Path) -> None:
    done("generate", made, *REQUEST, "--out", tmp_path / "plain.png")
    out = tmp_path / "many"
    options = ("--out", out, "--deadline", 600, "--json")
    report = json.loads(done("generate", made, *REQUEST, *options).stdout)
    assert report["scales_done"] == [SCALES] * 3
    first = sorted(out.iterdir())[0]
    assert read_settings(first)["scales_done"] == "3 of 3"
    np.testing.assert_array_equal(pixels(first), pixels(tmp_path / "plain.png")[:SIDE, :SIDE])
    assert "scales_done" not in read_settings(tmp_path / "plain.png")


def test_images_that_came_unequally_far(made: Path, tmp_path: Path) -> None:
    """The strip is white where an image had stopped; the GIF goes on showing it."""
    manifest = read_manifest(made)
    story = Filmstrip(manifest, 3)
    images = np.stack([np.full((SIDE, SIDE, 3), 100 * n, np.uint8) for n in range(3)])
    for first, count, stopped in ((0, 2, 2), (2, 1, 3)):
        for scale in range(stopped):
            preview = images[first : first + count] + np.uint8(10 * (scale + 1))
            tokens = np.zeros((count, 1), np.int64)
            event = ScaleEvent(
                scale=scale,
                scales=SCALES,
                first=first,
                tokens=tokens,
                preview=lambda preview=preview: preview,
            )
            story.see(event)
    story.finish(images)
    story.save_strip(tmp_path / "s.png", {})
    shown = [[int(cell(tmp_path / "s.png", n, k)[0, 0, 0]) for k in range(3)] for n in range(3)]
    assert shown == [[10, 0, 255], [110, 100, 255], [210, 220, 200]]
    story.save_gif(tmp_path / "s.gif", columns=3)
    with Image.open(tmp_path / "s.gif") as image:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)]
    assert [[int(f[0, n * STEP, 0]) for n in range(3)] for f in frames] == [
        [10, 110, 210],
        [0, 100, 220],
        [0, 100, 200],
    ]
    drawn = GeneratedImages(
        manifest=manifest,
        images=images,
        labels=[0] * 3,
        seeds=[0, 1, 2],
        text={},
        scales_done=[2, 2, 3],
    )
    assert drawn.stopped() == "images 0 to 1: 2 of 3 scales; image 2: 3 of 3 scales"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--preview", "x.png"), "must be different files"),
        (("--preview", "sub/../x.png"), "must be different files"),
        (("--preview", "s.gif"), "written as .png, .jpg, .jpeg or .webp, found s.gif"),
        (("--gif", "s.png"), "images are written as .gif, found s.png"),
        (("--gif", "folder.gif"), "folder.gif is not an ordinary file"),
        (("--gif", "/proc/self/s.gif"), "/proc/self/s.gif cannot be written"),
        (("--gif", "s.gif", "--count", "33"), "at most 32 images, found 33"),
        (("--deadline", "0"), "deadline must be a number of seconds above 0"),
        (("--deadline", "nan"), "deadline must be"),
        (("--deadline", "inf"), "deadline must be"),
        (("--deadline", "soon"), "'soon' is not a valid float"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: Callable[[], None],
    options: tuple[str, ...],
    part: str,
) -> None:
    def load(*arguments: object, **given: object) -> None:
        raise AssertionError("the bundle was loaded")

    monkeypatch.setattr(Pipeline, "load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "sub").mkdir()
    unchanged()
    refused(2, "generate", made, "--labels", 0, "--out", "x.png", *options, parts=(part,))


@pytest.mark.parametrize("at", ["see", "save"])
def test_ctrl_c_leaves_nothing_half_written(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: Callable[[], None],
    at: str,
) -> None:
    (tmp_path / "s.gif").write_bytes(b"old")

    def interrupt(self: object, stream: Any, **given: Any) -> None:
        if at == "save":
            stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Filmstrip if at == "see" else Image.Image, at, interrupt)
    unchanged()
    files = ("--out", tmp_path / "x.png", "--gif", tmp_path / "s.gif")
    result = run("generate", made, *REQUEST, *files)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
