"""Steps of the command-line tests: run a command, see it refuse, look at what it left.

A failure is one line on stderr, exit code 1 or 2 (130 for Ctrl-C), and leaves the disk as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from var_deploy.cli import main

SIDE = 8  # of an image of the small model
GIVEN = ("--checkpoint", "{files}/var.pth", "--tokenizer", "{files}/vae.pth")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr, result.stderr


def refused(code: int, *arguments: object, parts: tuple[str, ...] = ()) -> str:
    """The one line that a command fails with."""
    result = run(*arguments)
    assert_one_line(result, code, *parts)
    assert result.stderr.endswith("\n")
    assert "(unexpected;" not in result.stderr, "an error that nobody thought of"
    return result.stderr


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "var_deploy.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ONE_THREAD, timeout=120, **options
    )


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of files."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def export(files: Path, out: Path, *options: object, suffix: str = ".pth") -> Result:
    """`export` of the small model."""
    weights = ("--checkpoint", files / f"var{suffix}", "--tokenizer", files / f"vae{suffix}")
    return run("export", *weights, "--out", out, *options)
