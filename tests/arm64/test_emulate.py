"""What `make test-arm64` takes for the same as on x86-64, and what it does not."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm64 import emulate
from PIL import Image

ROOT = Path(__file__).parents[2]
PICTURE = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)


def shard() -> np.ndarray[Any, np.dtype[np.uint8]]:
    png, packed = io.BytesIO(), io.BytesIO()
    Image.fromarray(PICTURE[0]).save(png, "png")
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = len(png.getvalue())
        archive.addfile(member, io.BytesIO(png.getvalue()))
    return np.frombuffer(packed.getvalue(), np.uint8)


def arrays(**changes: Any) -> dict[str, Any]:
    drawn = {f"drawn_{k}": np.zeros((1, n), np.int64) for k, n in enumerate((1, 4, 9))}
    pictures = dict.fromkeys(("image", "decoded", "edited"), PICTURE)
    others = {"encoded_0": np.zeros((1, 4), np.int64), "command": PICTURE[0], "sample": shard()}
    return {**drawn, **pictures, **others, **changes}


@pytest.mark.parametrize("part", ["fp32", "fp16", "int8"])
def test_the_same_passes(part: str) -> None:
    assert all(holds for _, holds in emulate.compare(part, arrays(), arrays()))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("fp32", {"drawn_2": np.eye(1, 9, dtype=np.int64)}),
        ("fp32", {"encoded_0": np.ones((1, 4), np.int64)}),
        ("fp32", {"edited": PICTURE // 2}),
        ("fp16", {"drawn_0": np.ones((1, 1), np.int64)}),
        ("fp16", {"image": PICTURE[:, ::-1]}),
        ("int8", {"decoded": np.flip(PICTURE)}),
        ("int8", {"command": PICTURE[0, ::-1]}),
    ],
)
def test_what_lies_out_of_bounds_fails(part: str, changes: dict[str, Any]) -> None:
    found = [holds for _, holds in emulate.compare(part, arrays(**changes), arrays())]
    assert found.count(False) == 1


def test_later_tokens_may_tip_in_int8() -> None:
    changed = arrays(drawn_2=np.ones((1, 9), np.int64))
    assert all(holds for _, holds in emulate.compare("int8", changed, arrays()))


def test_without_an_emulator_the_reason_is_said(tmp_path: Path) -> None:
    """No program is found and there is no apt: skipped with exit code 0, before any work."""
    (tmp_path / "x.whl").touch()
    code = (
        "import sys; from arm64 import emulate\n"
        f"emulate.HOME = emulate.Path({str(tmp_path / 'none')!r})\n"
        "emulate.shutil.which = lambda *words, **options: None\n"
        "sys.exit(emulate.main())"
    )
    options = ("--wheel", tmp_path, "--bundle", tmp_path, "--pip", sys.executable)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, options)],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("arm64: skipped: ")
    assert done.stdout.count("\n") == 1
