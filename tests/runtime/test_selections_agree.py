"""Pipeline, Triton, Ray and plan run a bundle in the same way on the same machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_tensorrt import cudart
from var_deploy import __version__
from var_deploy.config import CUDA, RuntimeConfig
from var_deploy.errors import BackendError
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends import choice as backends
from var_deploy.runtime.backends.choice import choose_backend
from var_deploy.runtime.backends.host_memory import HostMemory
from var_deploy.triton.repository import on_gpu

ExportTo = Callable[..., Path]


@pytest.fixture
def bundle(export_to: ExportTo, tmp_path: Path) -> Path:
    made = export_to(precisions=("fp32", "fp16"), batch=2)
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


class CudaStandIn(HostMemory):
    """ONNX Runtime on a GPU, as far as choosing it goes."""

    name = CUDA

    def __init__(self, cuda_graph: bool = True) -> None:
        self.cuda_graph = cuda_graph

    def close(self) -> None:
        pass


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU and ONNX Runtime for it, without TensorRT."""
    cudart.reset()
    monkeypatch.setattr("var_deploy.runtime.backends.cuda.load_api", lambda: cudart)
    monkeypatch.setattr(backends, "has_cuda_provider", lambda: True)
    monkeypatch.setattr(backends, "open_cuda", CudaStandIn)
    yield
    assert cudart.live() == {}, "something was left on the device"


def test_a_cuda_provider_without_engines(
    provider: None, bundle: Path, manifest: Manifest
) -> None:
    """Triton put the model on the CPU, where the pipeline takes the GPU."""
    config = RuntimeConfig()
    choice = choose_backend(bundle, manifest, config)
    assert (choice.backend.name, choice.config.precision) == (CUDA, "fp16")
    assert on_gpu(bundle, manifest, config)
    for other in (RuntimeConfig(threads=1), RuntimeConfig(precision="int8")):
        assert not on_gpu(bundle, manifest, other)


def test_a_provider_without_a_gpu(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu lists its provider on any machine."""

    def nothing(*arguments: object) -> Any:
        raise BackendError("no GPU")

    monkeypatch.setattr(backends, "has_cuda_provider", lambda: True)
    monkeypatch.setattr("var_deploy.runtime.backends.cuda.load_api", nothing)
    monkeypatch.setattr(backends, "open_cuda", nothing)
    with Pipeline.load(bundle) as pipe:
        assert pipe.describe().reason == "onnxruntime-cuda: no GPU"
    assert not on_gpu(bundle, manifest, RuntimeConfig())


def test_a_share_of_the_cores(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was given some cores takes no more, whatever it falls back from."""
    monkeypatch.setattr(backends, "usable_cores", lambda: 2)
    with Pipeline.open(bundle, RuntimeConfig(), cores=1) as pipe:
        assert pipe.describe().settings["threads"] == "1"
        image = pipe.generate([1])
        pipe.decode(pipe.encode(image))
    with Pipeline.open(bundle, RuntimeConfig(threads=2), cores=1) as pipe:
        assert pipe.describe().settings["threads"] == "2", "what was asked for"
    with Pipeline.open(bundle, RuntimeConfig()) as pipe:
        assert pipe.describe().settings["threads"] == "2"


def test_a_worker_on_ray_that_falls_back_from_a_gpu(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node was to have a GPU, for which an actor gets one CPU; it took every core."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from var_deploy.cluster.devices import device_of
    from var_deploy.cluster.place import BundleSource
    from var_deploy.cluster.worker import Worker
    from var_deploy.datasets.spec import SetSpec

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    monkeypatch.setattr(backends, "usable_cores", lambda: 2)
    device = device_of(manifest, RuntimeConfig(), images=2)
    assert (device.gpus, device.cpus, device.threads) == (1, 1, None)
    held = BundleSource(
        bundle=bundle, digest=manifest.digest(), precision="auto", version=__version__, node=""
    )
    spec = SetSpec(
        bundle=manifest.digest(),
        precision="auto",
        backend="auto",
        layout="auto",
        sampling=manifest.defaults,
        seed=0,
        classes=2,
        per_class=1,
    )
    worker = Worker(held, RuntimeConfig(), device.cpus)
    how = worker.load(spec)
    assert (how.backend, how.settings["threads"]) == ("onnxruntime-cpu", "1")
    worker.close()


@pytest.mark.parametrize(
    ("gpus", "config", "expected"),
    [
        (0, RuntimeConfig(), (0, 1, 1)),
        (0, RuntimeConfig(threads=3), (0, 3, 3)),
        (1, RuntimeConfig(), (1, 1, None)),
        (1, RuntimeConfig(threads=3), (0, 3, 3)),
        (1, RuntimeConfig(backend="onnxruntime-cpu"), (0, 1, 1)),
        (0, RuntimeConfig(backend="tensorrt"), (1, 1, None)),
    ],
)
def test_what_a_worker_on_ray_occupies(
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    config: RuntimeConfig,
    expected: tuple[int, int, int | None],
) -> None:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from var_deploy.cluster.devices import device_of

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(gpus)})
    device = device_of(manifest, config, images=2)
    assert (device.gpus, device.cpus, device.threads) == expected
