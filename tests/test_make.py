"""The rules of make that README and INSTALL name, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_checkout import copy_checkout, fresh_environment
from PIL import Image

SAMPLES = {"VAR_DEPLOY_VERIFY_SAMPLES": "0"}  # of `verify`, which takes a minute for 500


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    """In a copy of the checkout whose .venv is the one that make made here."""
    if not Path(sys.prefix, ".ready").is_file():
        pytest.skip(f"{sys.prefix} was not made by make, which would install PyTorch first")
    checkout = copy_checkout(tmp_path / "var-deploy")
    (checkout / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    done = subprocess.run(
        ["bash", "-c", "make demo"],
        cwd=checkout,
        env={**fresh_environment(checkout), **SAMPLES},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pip install" not in done.stdout, "nothing was installed"
    with Image.open(checkout / "build" / "demo.png") as picture:
        assert picture.size == (658, 262)
    with Image.open(checkout / "build" / "demo-text.png") as picture:
        assert picture.size == (394, 262)
    # the shell does not find var-deploy yet, so the output says how it is called
    last = done.stdout.splitlines()[-4:]
    assert re.match(r"\. \S*\.venv/bin/activate ", last[0].strip())
    assert last[1].strip().startswith("var-deploy serve build/pocket")
    following = subprocess.run(
        ["bash", "-ec", f"{last[0]}\nvar-deploy inspect build/pocket --quiet"],
        cwd=checkout,
        env={**fresh_environment(checkout), "VIRTUAL_ENV": "", "HOME": os.environ["HOME"]},
        check=False,
    )
    assert following.returncode == 0
