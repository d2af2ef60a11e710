"""Which modules a command imports, and which it must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# each belongs to another command, another device, or an error message
NOT_LOADED = (
    *("torch", "onnx", "fastapi", "pydantic", "uvicorn", "asyncio", "email", "difflib", "ray"),
    *("matplotlib", "importlib.metadata", "multiprocessing", "http", "ssl", "unittest"),
    *("var_deploy.export", "var_deploy.serving", "var_deploy.cluster", "var_deploy.datasets"),
    *("var_deploy.bench", "var_deploy.triton", "var_deploy.runtime.tensorrt"),
    *("var_deploy.runtime.backends.cuda", "var_deploy.runtime.backends.onnxruntime_cuda"),
    *("var_deploy.planning.costs", "var_deploy.planning.memory", "var_deploy.labels.imagenet"),
    *("var_deploy.cli.bench", "var_deploy.cli.plan", "var_deploy.cli.sample"),
)
# the program as its script runs it, and what it has loaded by its end
RUN = """
import atexit, sys
atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))
from var_deploy.__main__ import main
main()
"""


def loaded(code: str, *arguments: object) -> set[str]:
    """Names of the modules that a process has loaded by its end, with the packages above them."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stderr.split())


def test_generate_imports_only_what_it_uses(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.png"
    found = loaded(RUN, "generate", made, "--labels", 0, "--out", out, "--quiet")
    assert out.is_file()
    assert {"onnxruntime", "var_deploy.cli.generate", "var_deploy.pipeline"} <= found
    assert [name for name in NOT_LOADED if name in found] == []


@pytest.mark.parametrize("name", ["importlib.metadata", "var_deploy.cli.plan"])
def test_an_import_too_many_is_seen(name: str) -> None:
    code = RUN.replace("import atexit, sys", f"import atexit, sys, {name}")
    assert name in loaded(code, "generate", "--help")
