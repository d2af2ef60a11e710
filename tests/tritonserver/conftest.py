"""Two bundles of a small model, and NVIDIA's server of the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonserver.server import MODEL, CannotRunError, Triton, serving

from cli_steps import done
from var_deploy.pipeline import Pipeline

Export = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def export_small(
    tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]
) -> Export:
    """Exports a model of five classes: four images a launch, three scales, images of 8 × 8."""
    pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")
    from var_deploy.export.bundle import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("bundles")

    def export(name: str, seed: int) -> Path:
        model = dataclasses.replace(small_model(seed=seed), labels=("a", "b", "c", "d", "e"))
        export_bundle(model, folder / name, ExportOptions(batch=4, layout="shared"))
        return folder / name

    return export


@pytest.fixture(scope="session")
def small(export_small: Export) -> Path:
    """Not to be changed."""
    return export_small(MODEL, 1)


@pytest.fixture(scope="session")
def other(export_small: Export) -> Path:
    """The same model with other weights."""
    return export_small("other", 2)


@pytest.fixture(scope="module")
def pipe(small: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def repository(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "models"
    done("triton", small, "--out", out, "--threads", 1, "--queue-delay", 500, "--queue", 64)
    return out


@pytest.fixture(scope="module")
def text_repository(text_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a bundle that takes prompts: two images a launch."""
    out = tmp_path_factory.mktemp("texts") / "models"
    done("triton", text_bundle, "--out", out, "--name", "text", "--threads", 1)
    return out


@pytest.fixture(scope="module")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """The server of `repository`, told what to load."""
    explicit = ("--model-control-mode=explicit", f"--load-model={MODEL}")
    try:
        server = serving(repository, tmp_path_factory.mktemp("triton"), *explicit)
        with server as running:
            yield running
    except CannotRunError as error:
        pytest.skip(str(error))
