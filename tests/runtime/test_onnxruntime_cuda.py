"""The ONNX Runtime CUDA backend, on a stand-in that computes on the CPU over the fake's memory."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from fake_tensorrt import cudart
from var_deploy.bundle.files import BundleFiles, GraphFile
from var_deploy.config import Layout
from var_deploy.errors import BackendError
from var_deploy.manifest import read_manifest
from var_deploy.runtime.backends.cuda import Cuda
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.backends.onnxruntime_cuda import PROVIDER, OrtCudaBackend
from var_deploy.runtime.backends.protocol import Backend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import Sampling, uniforms

SETTINGS = Sampling(cfg=2.0, top_k=0, top_p=0.95)
CPU = "CPUExecutionProvider"
ASYNCHRONOUS = "disable_synchronize_execution_providers"


class Binding:
    """IOBinding to addresses on the device."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, tuple[Any, ...]] = {}

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: Any,
        shape: tuple[int, ...],
        buffer_ptr: int,
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = (element_type, shape, buffer_ptr)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Any = None,
        buffer_ptr: int | None = None,
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = (element_type, shape, buffer_ptr)


def on_device(dtype: Any, shape: tuple[int, ...], address: int) -> NDArray[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    view: NDArray[Any] = cudart.view(address, size).view(dtype).reshape(shape)
    return view


class Session(cudart.Counted):
    """InferenceSession: asynchronous on the stream that it was given, if it was told so."""

    def __init__(
        self,
        path: str | bytes,
        sess_options: Any,
        providers: list[tuple[str, dict[str, str]]],
        enable_fallback: int = 1,
        disabled_optimizers: Sequence[str] = (),
    ) -> None:
        super().__init__("session")
        self.disabled_optimizers = tuple(disabled_optimizers)
        [(provider, self.settings)] = providers
        assert provider == PROVIDER
        assert not enable_fallback, "or it would go on with the CPU after a failure"
        self._real = onnxruntime.InferenceSession(
            path, sess_options, providers=[CPU], disabled_optimizers=list(disabled_optimizers)
        )

    def get_providers(self) -> list[str]:
        return [PROVIDER, CPU]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, run_options: Any) -> None:
        stream = int(self.settings["user_compute_stream"])

        def work() -> None:
            feed = {name: on_device(*place).copy() for name, place in binding.inputs.items()}
            names = list(binding.outputs)
            for name, array in zip(names, self._real.run(names, feed), strict=True):
                on_device(*binding.outputs[name])[...] = array

        cudart.enqueue(stream, work)
        if run_options.get_run_config_entry(ASYNCHRONOUS) != "1":
            cudart.cudaStreamSynchronize(stream)


@pytest.fixture
def ort() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        __version__="1.23.2",
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        InferenceSession=Session,
        get_available_providers=lambda: [PROVIDER, CPU],
        set_default_logger_severity=lambda severity: None,
    )


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    cudart.reset()
    yield
    assert cudart.live() == {}, "something was left on the device"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]) -> Path:
    pytest.importorskip("torch")
    from var_deploy.export.bundle import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("ort") / "bundle"
    export_bundle(small_model(), out, ExportOptions(precisions=("fp16",), batch=2))
    return out


def images(bundle: Path, backend: Backend, layout: Layout) -> tuple[NDArray[np.float32], list[str]]:
    """An image of each label, and the calls that it took."""
    manifest = read_manifest(bundle)
    loop = ScaleLoop(bundle, manifest, backend, "fp16", layout)
    try:
        draws = np.stack([uniforms(5, n, manifest.model.total_tokens) for n in range(2)])
        before = len(cudart.calls())
        return loop.run([3, 1], draws, SETTINGS).copy(), cudart.calls()[before:]
    finally:
        loop.close()


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
def test_images_are_those_of_the_cpu(bundle: Path, ort: Any, layout: Layout) -> None:
    expected, _ = images(bundle, OrtCpuBackend(1), layout)
    found, calls = images(bundle, OrtCudaBackend(ort, Cuda(cudart)), layout)
    np.testing.assert_array_equal(found, expected)
    # one copy in, two out (images with tokens, and f_hat), and nobody waits but at the end
    launches = 1 + read_manifest(bundle).model.scales + 1
    copy = "cudaMemcpyAsync"
    graphs = ["cudaGraphLaunch"] * launches
    assert calls == [copy, *graphs, copy, copy, "cudaStreamSynchronize"]


def test_sentences_are_drawn_as_on_the_cpu(ort: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from text_case import text_model

    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.debug.interpreter_backend import study_conditions

    bundle = tmp_path / "bundle"
    export_bundle(text_model(32), bundle, ExportOptions(batch=2, layout="shared"))
    manifest = read_manifest(bundle)
    prompts = study_conditions(manifest, 0)
    draws = np.stack([uniforms(5, n, manifest.model.draws) for n in range(2)])

    folding: dict[str, tuple[str, ...]] = {}

    class Backend(OrtCudaBackend):
        def open(self, graph: Any) -> Any:
            opened = super().open(graph)
            folding[graph.ref.name] = opened.session.disabled_optimizers
            return opened

    images = []
    for backend in (OrtCpuBackend(1), Backend(ort, Cuda(cudart))):
        loop = ScaleLoop(bundle, manifest, backend, "fp32", "shared")
        images.append(loop.run(prompts, draws, manifest.defaults).copy())
        loop.close()
    np.testing.assert_array_equal(*images)
    # what ONNX Runtime folds lies on the host: copied by every launch, which cannot be recorded
    assert folding.pop("unconditional") == ("ConstantFolding",)
    assert set(folding.values()) == {()}


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
def test_without_cuda_graphs_every_launch_waits(bundle: Path, ort: Any, layout: Layout) -> None:
    """A run that does not wait keeps page-locked memory that only one that does puts back."""
    expected, _ = images(bundle, OrtCpuBackend(1), layout)
    found, calls = images(bundle, OrtCudaBackend(ort, Cuda(cudart), cuda_graph=False), layout)
    np.testing.assert_array_equal(found, expected)
    launches = 1 + read_manifest(bundle).model.scales + 1
    assert calls.count("cudaStreamSynchronize") == launches + 1
    assert "cudaGraphLaunch" not in calls


def test_a_session_that_cannot_be_recorded_goes_on_without_and_says_so(
    bundle: Path, ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = images(bundle, OrtCpuBackend(1), "shared")
    real, recorded = Session.run_with_iobinding, iter(range(99))

    def run(self: Any, binding: Any, options: Any) -> None:
        # the decoder's two, the one of condition, the first scale's, then this one
        if options.get_run_config_entry(ASYNCHRONOUS) == "1" and next(recorded) == 4:
            raise RuntimeError("operation not permitted when stream is capturing")
        real(self, binding, options)

    monkeypatch.setattr(Session, "run_with_iobinding", run)
    backend = OrtCudaBackend(ort, Cuda(cudart))
    manifest = read_manifest(bundle)
    loop = ScaleLoop(bundle, manifest, backend, "fp16", "shared")
    told = backend.describe()["cuda_graph"]
    assert told.startswith("on, but not for step: ONNX Runtime failed in step: operation"), told
    before = len(cudart.calls())
    draws = np.stack([uniforms(5, n, manifest.model.total_tokens) for n in range(2)])
    np.testing.assert_array_equal(loop.run([3, 1], draws, SETTINGS), expected)
    assert cudart.calls()[before:].count("cudaGraphLaunch") == 2, "condition, decoder"
    loop.close()


def test_a_closing_session_puts_back_what_its_recordings_kept(
    bundle: Path, ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to the session's own end it happens in a callback, where CUDA ends the process."""
    manifest = read_manifest(bundle)
    loop = ScaleLoop(bundle, manifest, OrtCudaBackend(ort, Cuda(cudart)), "fp16", "shared")
    real, waits = Session.run_with_iobinding, list[bool]()

    def run(self: Any, binding: Any, options: Any) -> None:
        waits.append(options.get_run_config_entry(ASYNCHRONOUS) != "1")
        real(self, binding, options)

    monkeypatch.setattr(Session, "run_with_iobinding", run)
    loop.close()
    assert waits == [True] * 3, "one run of each session"


def test_settings_of_the_provider(bundle: Path, ort: Any) -> None:
    cuda = Cuda(cudart)
    backend = OrtCudaBackend(ort, cuda)
    files = BundleFiles(bundle, read_manifest(bundle), "fp16")
    session = backend.open(files.graph("decoder"))
    settings = session.session.settings
    assert settings["user_compute_stream"] == str(cuda.stream) != "0"
    assert settings["use_tf32"] == "0"
    assert all(isinstance(value, str) for value in settings.values()), "ONNX Runtime wants text"
    backend.close()


def test_it_says_what_it_runs_on(ort: Any) -> None:
    backend = OrtCudaBackend(ort, Cuda(cudart))
    described = {
        "backend": backend.name,
        "onnxruntime": "1.23.2",
        "device": "Orin, 16 SMs (sm87)",
        "cuda_graph": "on",
    }
    assert backend.describe() == described
    backend.close()
    backend.close()


def test_without_the_provider_it_says_what_to_install(ort: Any) -> None:
    ort.get_available_providers = lambda: [CPU]
    words = r"has no CUDAExecution.*; run .*pip install .*onnxruntime-gpu>="
    with pytest.raises(BackendError, match=words):
        OrtCudaBackend(ort, Cuda(cudart))
    assert cudart.live() == {}, "the device that it was given is its own, also when it fails"


def test_without_onnxruntime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = r'not installed; run .*pip install .*"onnxruntime-gpu>='
    with pytest.raises(BackendError, match=words):
        OrtCudaBackend(cuda=Cuda(cudart))


def test_the_installed_onnxruntime_is_asked_for_its_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ort: Any
) -> None:
    asked: list[str] = []

    def preload_dlls() -> None:
        asked.append("preload")
        print("Failed to load libcudnn.so.9")

    ort.preload_dlls = preload_dlls
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    OrtCudaBackend(cuda=Cuda(cudart)).close()
    assert asked == ["preload"]
    assert capsys.readouterr().out == "", "a report as JSON may be on its way there"


def test_a_session_that_fell_back_to_the_cpu_is_refused(
    bundle: Path, ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "get_providers", lambda self: [CPU])
    with pytest.raises(BackendError, match=r"does not load its CUDAExecutionProvider.*cudnn"):
        images(bundle, OrtCudaBackend(ort, Cuda(cudart)), "shared")
    assert cudart.live() == {}


def test_what_onnxruntime_says_becomes_one_line(
    bundle: Path, ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, binding: Any, run_options: Any) -> None:
        raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED\n while running Conv")

    monkeypatch.setattr(Session, "run_with_iobinding", fail)
    with pytest.raises(BackendError) as caught:
        images(bundle, OrtCudaBackend(ort, Cuda(cudart)), "shared")
    words = "ONNX Runtime failed in condition: CUDNN_STATUS_ALLOC_FAILED while running Conv"
    assert str(caught.value) == words


def test_a_graph_that_cannot_be_read_is_named(tmp_path: Path, ort: Any) -> None:
    backend = OrtCudaBackend(ort, Cuda(cudart))
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"ONNX Runtime refuses decoder.onnx: "):
        backend.open(GraphFile.outside(tmp_path / "decoder.onnx"))
    backend.close()


def test_the_options_are_ones_that_onnxruntime_knows(bundle: Path) -> None:
    """Its own CUDA provider, where there is one, checks every key."""
    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {PROVIDER}")
    backend = OrtCudaBackend()
    backend.open(BundleFiles(bundle, read_manifest(bundle), "fp16").graph("decoder"))
    backend.close()
