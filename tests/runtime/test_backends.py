"""Which backend runs a bundle, on a machine that has everything, as far as the code can see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import fake_tensorrt
from fake_tensorrt import cudart
from var_deploy.errors import BackendError, BundleError, UsageError
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends import choice as backends
from var_deploy.runtime.backends.cuda import Cuda
from var_deploy.runtime.tensorrt import library as libraries
from var_deploy.runtime.tensorrt.build import build_bundle
from var_deploy.runtime.tensorrt.library import Library

ExportTo = Callable[..., Path]
LABELS = (3, 0, 4)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An Orin with TensorRT 10.3."""
    cudart.reset()
    monkeypatch.setattr("var_deploy.runtime.backends.cuda.load_api", lambda: cudart)
    monkeypatch.setattr(libraries, "load_library", lambda name=None: Library(fake_tensorrt))
    yield
    assert cudart.live() == {}, "something was left on the device"


@pytest.fixture
def bundle(export_to: ExportTo, tmp_path: Path) -> Path:
    """Both precisions and layouts, no engines yet."""
    made = export_to(precisions=("fp32", "fp16"), batch=2)
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def rounded(export_to: ExportTo, tmp_path: Path) -> Path:
    """All precisions, no engines yet."""
    options = {"layout": "shared", "calibration": 1}
    made = export_to(precisions=("int8", "fp16", "fp32"), batch=2, **options)
    return Path(shutil.copytree(made, tmp_path / "rounded"))


def build(bundle: Path, **options: object) -> None:
    given: dict[str, object] = {"library": Library(fake_tensorrt), "layout": "shared", **options}
    build_bundle(bundle, **given)  # type: ignore[arg-type]


def test_without_engines_it_is_the_cpu(gpu: None, bundle: Path) -> None:
    with Pipeline.load(bundle) as pipe:
        how = pipe.describe()
    assert (how.backend, how.precision, how.layout) == (
        "onnxruntime-cpu",
        "fp32",
        "shared",
    )
    assert not how.reason, "nothing better was passed over"


@pytest.mark.parametrize("layout", ["shared", "per-scale"])
def test_engines_of_this_device_are_taken(gpu: None, bundle: Path, layout: str) -> None:
    build(bundle, layout=layout)
    with Pipeline.load(bundle) as pipe:
        how = pipe.describe()
        images = pipe.generate(LABELS, seed=7)
    assert (how.backend, how.precision, how.layout) == ("tensorrt", "fp16", layout)
    assert how.settings["device"] == "Orin, 16 SMs (sm87)"
    assert how.reason == "its engines were built"
    with Pipeline.load(bundle, backend="onnxruntime-cpu", precision="fp16") as pipe:
        np.testing.assert_array_equal(images, pipe.generate(LABELS, seed=7))


@pytest.mark.parametrize("layout", ["shared", "per-scale"])
def test_engines_encode_decode_and_edit(gpu: None, bundle: Path, layout: str) -> None:
    build(bundle, layout=layout)
    mask = np.zeros((8, 8), np.bool_)
    mask[:, 4:] = True
    found = []
    for options in ({}, {"backend": "onnxruntime-cpu", "precision": "fp16"}):
        with Pipeline.load(bundle, **options) as pipe:
            images = pipe.generate(LABELS, seed=7)
            tokens = pipe.encode(list(images))
            edited = pipe.edit(images[0], mask, label=2, seed=[1, 2, 3])
            found.append([*tokens, pipe.decode(tokens), pipe.decode(tokens, scales=1), edited])
            assert pipe.describe().backend == options.get("backend", "tensorrt")
    for on_engines, on_cpu in zip(*found, strict=True):
        np.testing.assert_array_equal(on_engines, on_cpu)


def test_without_engines_for_images_only_those_are_missing(gpu: None, bundle: Path) -> None:
    build(bundle, encoder=False)
    with Pipeline.load(bundle) as pipe:
        images = pipe.generate(LABELS[:1], seed=7)
        with pytest.raises(BackendError, match=r"encoder.*var-deploy build"):
            pipe.encode(images[0])
        assert len(pipe.generate(LABELS[:1], seed=8)) == 1, "it draws as before"


def test_of_two_layouts_the_memory_chooses(
    gpu: None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, layout="both")
    for free, layout in ((1 << 40, "per-scale"), (1, "shared")):
        monkeypatch.setattr(Cuda, "free_memory", lambda self, free=free: (free, free))
        with Pipeline.load(bundle) as pipe:
            assert pipe.describe().layout == layout
    with Pipeline.load(bundle, layout="per-scale") as pipe:
        assert pipe.describe().layout == "per-scale"


def test_fp32_engines_serve_where_there_are_no_others(gpu: None, bundle: Path) -> None:
    build(bundle, precision="fp32")
    with Pipeline.load(bundle) as pipe:
        how = pipe.describe()
    assert (how.backend, how.precision) == ("tensorrt", "fp32")


def test_engines_do_not_need_the_graphs(gpu: None, bundle: Path) -> None:
    build(bundle)
    for graph in bundle.glob("*/scale_00.onnx"):  # the engine of `step` stands for it
        graph.unlink()
    with Pipeline.load(bundle) as pipe:
        assert pipe.describe().backend == "tensorrt"
    with pytest.raises(BundleError, match=r"scale_00\.onnx is missing"):
        Pipeline.load(bundle, backend="onnxruntime-cpu")


def test_engines_of_another_device_are_passed_over_and_said_so(gpu: None, bundle: Path) -> None:
    build(bundle, find_device=lambda: ("Xavier, 8 SMs", 72), find_memory=lambda: 1)
    with Pipeline.load(bundle) as pipe:
        how = pipe.describe()
    assert how.backend == "onnxruntime-cpu"
    assert "it has tensorrt-10.3.0-sm72-fp16" in how.reason
    assert "Orin, 16 SMs (sm87)" in how.reason
    with pytest.raises(BackendError, match=r"sm72.*run var-deploy build"):
        Pipeline.load(bundle, backend="tensorrt")


def test_a_damaged_engine_is_refused_not_replaced(gpu: None, bundle: Path) -> None:
    """The engines fit the device: to run something else in silence would hide the damage."""
    build(bundle)
    plan = next(bundle.glob("engines/*/step.plan"))
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(BackendError, match="truncated"):
        Pipeline.load(bundle)


def test_a_changed_bundle_makes_its_engines_stale(gpu: None, bundle: Path) -> None:
    build(bundle)
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    data["files"]["fp16/weights.bin"]["sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(BackendError, match="built from other graphs, weights or settings"):
        Pipeline.load(bundle, backend="tensorrt")


def test_threads_ask_for_the_cpu(gpu: None, bundle: Path) -> None:
    build(bundle)
    with Pipeline.load(bundle, threads=1) as pipe:
        assert pipe.describe().backend == "onnxruntime-cpu"
    for backend in ("tensorrt", "onnxruntime-cuda"):
        with pytest.raises(UsageError, match=f"threads are for onnxruntime-cpu, not for {backend}"):
            Pipeline.load(bundle, backend=backend, threads=1)


def test_a_processor_takes_int8_where_the_bundle_has_it(gpu: None, rounded: Path) -> None:
    with Pipeline.load(rounded) as pipe:
        how, images = pipe.describe(), pipe.generate(LABELS, seed=7)
    assert (how.backend, how.precision) == ("onnxruntime-cpu", "int8")
    assert how.reason == "the bundle was exported with int8"
    with Pipeline.load(rounded, precision="int8") as pipe:
        how = pipe.describe()
        np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), images)
    assert how.reason == "precision int8 is for onnxruntime-cpu"
    with Pipeline.load(rounded, precision="fp32") as pipe:
        assert pipe.describe().precision == "fp32"
        assert (pipe.generate(LABELS, seed=7) != images).any()


def test_a_gpu_never_takes_int8(gpu: None, rounded: Path) -> None:
    build(rounded)
    with Pipeline.load(rounded) as pipe:
        how = pipe.describe()
    assert (how.backend, how.precision) == ("tensorrt", "fp16")
    with Pipeline.load(rounded, precision="int8") as pipe:
        assert pipe.describe().backend == "onnxruntime-cpu"
    for backend in ("tensorrt", "tensorrt_rtx", "onnxruntime-cuda"):
        with pytest.raises(UsageError, match=f"int8 is for onnxruntime-cpu, not for {backend}"):
            Pipeline.load(rounded, backend=backend, precision="int8")
    with pytest.raises(UsageError, match="int8 is for onnxruntime-cpu, not for TensorRT"):
        build(rounded, precision="int8")


def test_a_bundle_of_int8_alone(gpu: None, rounded: Path) -> None:
    path = rounded / "manifest.json"
    data = json.loads(path.read_text())
    data["graphs"] = {"int8": data["graphs"]["int8"]}
    path.write_text(json.dumps(data))
    (rounded / "engines").mkdir()
    with Pipeline.load(rounded) as pipe:
        how = pipe.describe()
    assert (how.backend, how.precision) == ("onnxruntime-cpu", "int8")
    assert how.reason.startswith("TensorRT: the bundle has only int8 graphs, which")
    for backend in ("tensorrt", "onnxruntime-cuda"):
        with pytest.raises(BackendError, match="has only int8 graphs"):
            Pipeline.load(rounded, backend=backend)
    with pytest.raises(BackendError, match=r"only int8 graphs.*--precision fp16"):
        build(rounded)


def test_a_gpu_without_a_provider_is_one_line(bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider|onnxruntime-gpu"):
        Pipeline.load(bundle, backend="onnxruntime-cuda")


def test_cuda_that_fails_is_passed_over(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise BackendError("cudaMalloc failed")

    monkeypatch.setattr(backends, "has_cuda_provider", lambda: True)
    monkeypatch.setattr(backends, "open_cuda", broken)
    with Pipeline.load(bundle) as pipe:
        how = pipe.describe()
    assert how.backend == "onnxruntime-cpu"
    assert how.reason == "onnxruntime-cuda: cudaMalloc failed"
