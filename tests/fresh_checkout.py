"""A copy of this checkout, and a shell in which nothing of var-deploy is installed: what somebody
has who follows the README from its first line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# at the top of a checkout: made by somebody, and not part of it
MADE = {".venv", ".git", ".types", ".mypy_cache", ".pytest_cache", ".ruff_cache", "build", "dist"}
# those of make: under `make test` an inner make would say which folders it enters and leaves
OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")


def copy_checkout(folder: Path) -> Path:
    """Copy the checkout to `folder` with a program `python3` in `.bin/` there, this Python's.

    Files are as old as can be, so that make takes whatever it finds in `.venv` for newer.
    """

    def ignored(path: str, names: list[str]) -> set[str]:
        caches = {name for name in names if name == "__pycache__" or name.endswith(".egg-info")}
        return caches | (MADE & set(names) if Path(path) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=ignored)
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    program = folder / ".bin" / "python3"
    program.parent.mkdir()
    base = getattr(sys, "_base_executable", sys.executable)  # not that of this environment
    program.write_text(f'#!/bin/sh\nexec "{base}" "$@"\n')
    program.chmod(0o755)
    return folder


def fresh_environment(folder: Path) -> dict[str, str]:
    """Variables of a shell that finds the system's programs, and none of this environment."""
    own = os.path.realpath(Path(sys.executable).parent)  # which others may name in another way
    path = [str(folder / ".bin")]
    path += [p for p in os.environ["PATH"].split(os.pathsep) if p and os.path.realpath(p) != own]
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return {
        **kept,
        "PATH": os.pathsep.join(path),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),  # other versions: make test-pythons
        "PIP_NO_COMPILE": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


@cache
def index_problem() -> str:
    """Why pip gets nothing from its index here; "" where it does."""
    command = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir")
    quick = ("--timeout", "10", "--retries", "1", "--disable-pip-version-check")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            (*command, *quick, "-d", folder, "click"), capture_output=True, timeout=120, check=False
        )
    return "" if done.returncode == 0 else "no package index can be reached to install from"
