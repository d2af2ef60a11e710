"""OpenVINO drives the same graphs through the same loop, and says what it computed in."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from var_deploy.bench.openvino_peer import OpenVinoBackend, OpenVinoWorker
from var_deploy.bench.worker import serve
from var_deploy.bundle.files import GraphFile
from var_deploy.config import Layout
from var_deploy.errors import BackendError, BundleError, UsageError
from var_deploy.host.installation import pip_command
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.backends.protocol import Backend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.measure import launch_names
from var_deploy.sampling import uniforms

ExportTo = Callable[..., Path]


@pytest.fixture(scope="module")
def openvino() -> Any:
    return pytest.importorskip("openvino", reason="openvino is not installed: nothing to drive")


@pytest.fixture(scope="module")
def bundle(export_to: ExportTo) -> Path:
    return export_to(batch=2)


def run(bundle: Path, backend: Backend, layout: Layout) -> tuple[Any, Any]:
    """Tokens of all scales, one after the other, and the images of seed 5."""
    manifest = read_manifest(bundle)
    loop = ScaleLoop(bundle, manifest, backend, "fp32", layout)
    draws = np.stack([uniforms(5, n, manifest.model.total_tokens) for n in range(2)])
    try:
        image = loop.run([3, 1], draws, manifest.defaults).copy()
        return np.concatenate(loop.tokens(), axis=1), image
    finally:
        loop.close()


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
def test_tokens_and_images_are_those_of_onnx_runtime(
    openvino: Any, bundle: Path, layout: Layout
) -> None:
    tokens, image = run(bundle, OpenVinoBackend(threads=1), layout)
    expected_tokens, expected = run(bundle, OrtCpuBackend(1), layout)
    assert len(np.unique(tokens)) > 5 and expected.std() > 0.05, "or this would be hollow"
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(image, expected, atol=1e-4)


def test_a_worker_makes_the_pipelines_images(openvino: Any, bundle: Path) -> None:
    """Three images in batches of two, launches of both batches added up."""
    worker = OpenVinoWorker(bundle, 3, threads=1)
    sample = worker.generate()
    assert list(sample.launches) == launch_names(read_manifest(bundle))
    assert 0 < sum(sample.launches.values()) < sample.seconds
    with Pipeline.load(bundle, backend="onnxruntime-cpu", threads=1) as pipeline:
        expected = pipeline.generate([0, 2, 4])
    assert np.abs(worker.images.astype(int) - expected).max() <= 1
    assert worker.describe().settings == {
        "backend": "openvino",
        "openvino": openvino.__version__,
        "threads": "1",
        "precision": "f32",
        "settings": "PERFORMANCE_HINT LATENCY",
        "layout": "per-scale",
        "graphs": "fp32",
        "images a launch": "2",
    }
    worker.close()
    with pytest.raises(BackendError, match="closed"):
        worker.generate()


def test_bf16_is_not_claimed_where_the_cpu_has_none(openvino: Any, bundle: Path) -> None:
    capable = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    backend = OpenVinoBackend("bf16", threads=1)
    fallen_back = "bf16 (computed in f32: this CPU has no bf16)"
    expected = "bf16" if capable else fallen_back
    assert backend.describe()["precision"] == expected
    backend.open(GraphFile.outside(bundle / "fp32" / "condition.onnx"))
    assert backend.describe()["precision"] == expected, "as the compiled model says"


def test_tokens_are_replaced_in_bf16(openvino: Any, bundle: Path) -> None:
    """Its sampler may arrive at no code, which the loop takes for logits that are no numbers."""
    worker = OpenVinoWorker(bundle, 1, hint="bf16", layout="shared", threads=1)
    worker._backend.computes = "bf16"  # as on a CPU that has it
    assert worker.describe().settings["tokens"] == "replaced: to draw them takes fp32"
    assert worker.describe().settings["precision"] == "bf16"
    worker.generate()
    assert not np.concatenate(worker._loop.tokens(), axis=1).any()
    worker._backend.computes = "f32"
    worker.generate()
    assert np.concatenate(worker._loop.tokens(), axis=1).any()
    worker.close()


def test_without_static_graphs_it_takes_step(openvino: Any, export_to: ExportTo) -> None:
    shared = export_to(batch=1, layout="shared")
    worker = OpenVinoWorker(shared, 1, threads=1)
    assert worker.describe().settings["layout"] == "shared"
    assert len(worker.generate().launches) == 5
    worker.close()
    with pytest.raises(BundleError, match="no graph scale_00"):
        OpenVinoWorker(shared, 1, layout="per-scale")
    with pytest.raises(BundleError, match="no fp16 graphs"):
        OpenVinoWorker(shared, 1, precision="fp16")


def test_a_graph_that_it_refuses_is_one_line(openvino: Any, tmp_path: Path) -> None:
    graph = tmp_path / "scale_00.onnx"
    graph.write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"^OpenVINO refuses scale_00\.onnx: [^\n]+$"):
        OpenVinoBackend().open(GraphFile.outside(graph))


def test_wrong_options_are_refused(openvino: Any) -> None:
    with pytest.raises(UsageError, match="hint must be one of f32, bf16, found 'int8'"):
        OpenVinoBackend("int8")
    with pytest.raises(UsageError, match="threads must be 0"):
        OpenVinoBackend(threads=-1)


def test_without_openvino_there_is_one_clear_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # what makes an import fail
    replies = io.StringIO()
    assert serve(lambda: OpenVinoWorker(bundle, 1), io.StringIO(), replies) == 1
    (line,) = replies.getvalue().splitlines()
    told = f'openvino is not installed; run {pip_command()} "openvino'
    assert json.loads(line)["problem"].startswith(told)
