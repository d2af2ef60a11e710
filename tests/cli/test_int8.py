"""int8 on the command line, over pocket: exported, looked at, drawn with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli_steps import done, pixels, refused
from var_deploy.image.images import psnr, read_settings
from var_deploy.manifest import read_manifest

pytest.importorskip("torch")

CLASSES = 10


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "pocket"
    options = ("--precision", "fp32", "--precision", "int8", "--layout", "shared")
    done("export", "pocket", "--out", out, *options)
    return out


def draw(bundle: Path, out: Path, *options: object) -> list[np.ndarray]:
    """An image of every class, in [0, 1]."""
    done("generate", bundle, "--out", f"{out}/", "--threads", 1, *options)
    images = [pixels(path).astype(np.float32) / 255 for path in sorted(out.iterdir())]
    assert len(images) == CLASSES
    return images


def test_int8_draws_what_fp32_draws(pocket: Path, tmp_path: Path) -> None:
    """Some codes differ, and the picture stays: measured 22 dB between the two precisions in the
    middle of the classes, 15 dB between two seeds."""
    rounded = draw(pocket, tmp_path / "int8", "--seed", 0)
    text = read_settings(next((tmp_path / "int8").iterdir()))
    assert text["precision"] == "int8", "taken by itself, since the bundle has it"
    full = draw(pocket, tmp_path / "fp32", "--seed", 0, "--precision", "fp32")
    other = draw(pocket, tmp_path / "other", "--seed", 1, "--precision", "fp32")
    near, far = (
        float(np.median([psnr(a, b) for a, b in zip(images, full, strict=True)]))
        for images in (rounded, other)
    )
    assert near > 19 and near > far + 3, (near, far)


def test_the_reason_is_told(pocket: Path, tmp_path: Path) -> None:
    asked = ("--labels", 0, "--out", tmp_path / "x.png", "--json")
    runtime = json.loads(done("generate", pocket, *asked).stdout)["runtime"]
    assert runtime["precision"] == "int8"
    assert runtime["chosen because"] == "the bundle was exported with int8"
    other = ("--precision", "int8", "--backend", "onnxruntime-cuda")
    refused(
        *(2, "generate", pocket, *asked[:-1], *other),
        parts=("int8 is for onnxruntime-cpu, not for onnxruntime-cuda",),
    )


def test_inspect_and_plan_know_it(pocket: Path) -> None:
    text = done("inspect", pocket).stdout
    assert "precisions   fp32, int8" in text and "int8/step.onnx" in text
    found = json.loads(done("plan", pocket, "--device", "cpu", "--json").stdout)
    assert (found["precision"], found["fits"]) == ("int8", True)
    weights = found["layouts"]["shared"]["footprint"]["weights"]
    graphs = read_manifest(pocket).graphs["int8"]
    held = sum(graphs[n].weight_bytes for n in ("condition", "step", "decoder"))
    # one up-sampling of pocket stays in fp32, which its sizes alone do not tell
    assert 0.98 * held < weights < held


def test_int8_alone(tmp_path: Path) -> None:
    out = tmp_path / "pocket"
    options = ("--random-weights", 0, "--layout", "shared", "--calibration", 1)
    done("export", "pocket", "--out", out, "--precision", "int8", *options)
    assert sorted(p.name for p in out.iterdir()) == ["int8", "manifest.json"]
    done("generate", out, "--labels", 0, "--out", tmp_path / "x.png", "--threads", 1)
    assert read_settings(tmp_path / "x.png")["precision"] == "int8"
    refused(
        *(1, "generate", out, "--labels", 0, "--out", tmp_path / "y.png", "--precision", "fp32"),
        parts=("no fp32 graphs (it has int8)", "--precision fp32"),
    )


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (("--precision", "int8", "--calibration", 0), "at least 1 with int8"),
        (("--precision", "int4"), "int4"),
        (("--calibration", "few"), "--calibration"),
    ],
)
def test_bad_usage(tmp_path: Path, wrong: tuple[object, ...], part: str) -> None:
    refused(2, "export", "pocket", "--out", tmp_path / "b", *wrong, parts=(part,))
    assert not (tmp_path / "b").exists()
