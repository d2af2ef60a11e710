"""What `make test-pythons` takes for the same, and what it does not."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pythons import every_python
from pythons.every_python import Result, compare, find_python

PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


def png(array: NDArray[np.uint8], level: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png", compress_level=level)
    return buffer.getvalue()


def made(folder: Path, python: str, onnxruntime: str, **files: bytes) -> Result:
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name.replace('_', '-')}.png").write_bytes(data)
    (folder / "about.json").write_text(json.dumps(python))
    return Result(python, folder, about={"versions": {"onnxruntime": onnxruntime}})


def problems(tmp_path: Path, found: bytes, library: str = "1.32.0", name: str = "fp32_a") -> Result:
    reference = made(tmp_path / "reference", "3.13", "1.32.0", **{name: png(PICTURE)})
    result = made(tmp_path / "result", "3.10", library, **{name: found})
    compare(result, reference)
    return result


def test_the_same_bytes_and_the_same_pixels_pass(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    same = problems(tmp_path / "one", png(PICTURE))
    assert (same.problems, same.notes) == ([], [])
    (tmp_path / "other").mkdir()
    packed = problems(tmp_path / "other", png(PICTURE, level=1))
    assert (packed.problems, packed.notes) == ([], ["fp32-a.png: other bytes of the same pixels"])


@pytest.mark.parametrize(
    ("library", "step", "allowed"),
    [("1.32.0", 1, False), ("1.23.2", 1, True), ("1.23.2", 2, False)],
)
def test_one_level_may_differ_where_the_library_does(
    tmp_path: Path, library: str, step: int, allowed: bool
) -> None:
    other = PICTURE.copy()
    other[0, 0, 0] += step
    result = problems(tmp_path, png(other), library)
    assert bool(result.problems) is not allowed
    assert bool(result.notes) is allowed


def test_noise_is_no_int8_picture(tmp_path: Path) -> None:
    noise = png(np.random.default_rng(1).integers(0, 255, PICTURE.shape, np.uint8))
    (problem,) = problems(tmp_path, noise, "1.23.2", "int8_a").problems
    assert problem.startswith("int8-a.png is not that of 3.13: ")


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    reference = made(tmp_path / "reference", "3.13", "1", fp32_a=b"", fp32_b=b"")
    result = made(tmp_path / "result", "3.10", "1", fp32_a=b"")
    compare(result, reference)
    assert "expected" in result.problems[0]


def test_pythons_are_found_by_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = "{}.{}".format(*sys.version_info)
    fake = tmp_path / "versions" / f"{version}.9" / "bin"
    fake.mkdir(parents=True)
    (fake / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert find_python(version) == str(fake / "python")
    (fake / "python").unlink()
    (fake / "python").write_text("#!/bin/sh\necho 2.7\n")
    (fake / "python").chmod(0o755)
    monkeypatch.setattr(every_python.shutil, "which", lambda name: None)
    assert find_python(version) is None
