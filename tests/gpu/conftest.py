"""What tests on a real GPU share. Without one they are skipped, and say why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from var_deploy.errors import BackendError
from var_deploy.runtime.backends.cuda import Cuda
from var_deploy.runtime.backends.onnxruntime_cuda import OrtCudaBackend

COMMAND = [sys.executable, "-m", "var_deploy.cli"]


@pytest.fixture(scope="session")
def _gpu() -> None:
    """Raises Skipped where cuda-python or a GPU is missing."""
    try:
        Cuda().close()
    except BackendError as error:
        pytest.skip(f"no GPU can be used: {str(error).partition(';')[0]}")


@pytest.fixture
def cuda(_gpu: None) -> Iterator[Cuda]:
    made = Cuda()
    yield made
    made.close()


@pytest.fixture(scope="session")
def open_backend(_gpu: None) -> Callable[..., OrtCudaBackend]:
    """Makes an ONNX Runtime CUDA backend; skips where onnxruntime-gpu is missing."""
    try:
        OrtCudaBackend().close()
    except BackendError as error:
        pytest.skip(str(error))
    return OrtCudaBackend


def exported(preset: str, variable: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the environment variable names; without it the preset is exported."""
    if existing := os.environ.get(variable):
        return Path(existing)
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("gpu") / preset
    precisions = ["--precision", "fp32", "--precision", "fp16"]
    subprocess.run([*COMMAND, "export", preset, *precisions, "--out", str(out)], check=True)
    return out


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory, _gpu: None) -> Path:
    return exported("pocket", "VAR_DEPLOY_GPU_BUNDLE", tmp_path_factory)


@pytest.fixture(scope="session")
def pocket_text(tmp_path_factory: pytest.TempPathFactory, _gpu: None) -> Path:
    return exported("pocket-text", "VAR_DEPLOY_GPU_TEXT_BUNDLE", tmp_path_factory)
