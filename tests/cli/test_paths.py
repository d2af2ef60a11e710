"""Names of files that are bytes and no text: what works, and what says why it does not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli_steps import SIDE, done, refused
from var_deploy.errors import UsageError
from var_deploy.files.paths import utf8_path

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="names of files are text on this system"
)
ODD = os.fsdecode(b"d\xff\xc3(x")
SHOWN = r"d\xff\xc3(x"
THREAD = ("--threads", 1)


@pytest.fixture
def odd(made: Path, tmp_path: Path) -> Path:
    """A bundle in a folder whose name is not UTF-8."""
    return Path(shutil.copytree(made, tmp_path / ODD))


def test_outputs_and_inputs(made: Path, tmp_path: Path) -> None:
    picture, out = tmp_path / f"{ODD}.png", tmp_path / f"{ODD}-out.png"
    array = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(array).save(picture)
    said = done("generate", made, "--labels", 1, *THREAD, "--out", out).stdout
    assert f"/{SHOWN}-out.png (1 image of" in said
    report = json.loads(done("generate", made, "--labels", 1, "--out", out, "--json").stdout)
    assert report["out"] == str(out)
    done("edit", made, picture, "--box", "0,0,4,8", *THREAD, "--out", tmp_path / f"{ODD}/")
    done("encode", made, picture, *THREAD, "--out", tmp_path / f"{ODD}.npz")
    tokens = tmp_path / f"{ODD}.npz"
    done("reconstruct", made, tokens, *THREAD, "--out", tmp_path / f"{ODD}-s.png")
    settings = ("--per-class", 1, *THREAD, "--npz", "--out", tmp_path / f"{ODD}-set")
    done("sample", made, *settings)
    assert f"{SHOWN}-set is complete" in done("sample", made, *settings, "--check").stdout


def test_a_bundle_is_read_and_runs(odd: Path, made: Path, tmp_path: Path) -> None:
    """Graphs are opened from their checked bytes, and weights through a descriptor."""
    assert SHOWN in done("inspect", odd).stdout
    json.loads(done("inspect", odd, "--json").stdout)
    for bundle, name in ((odd, "odd.png"), (made, "plain.png")):
        done("generate", bundle, "--labels", 1, *THREAD, "--out", tmp_path / name)
    assert (tmp_path / "odd.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_a_bundle_from_within_its_folder(
    odd: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "x.png"
    done("generate", made, "--labels", 1, *THREAD, "--out", expected)
    monkeypatch.chdir(odd)
    for bundle, name in ((".", "a.png"), (odd, "b.png")):
        done("generate", bundle, "--labels", 1, *THREAD, "--out", name)
        assert Path(name).read_bytes() == expected.read_bytes()


def test_an_export_is_refused_before_any_work(tmp_path: Path) -> None:
    words = (SHOWN, "is not UTF-8, and the library of ONNX cannot open it")
    refused(2, "export", "pocket", "--out", tmp_path / ODD, parts=words)
    assert not list(tmp_path.iterdir())


def test_the_relative_path_where_it_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {
        "abs": utf8_path(folder / "é" / "a.onnx", "it"),
        "plain": utf8_path(tmp_path / "a.onnx", "it"),
    }
    assert found == {"abs": "é/a.onnx", "plain": str(tmp_path / "a.onnx")}
    with pytest.raises(UsageError, match="is not UTF-8, and it cannot open it"):
        utf8_path(Path(ODD), "it")
