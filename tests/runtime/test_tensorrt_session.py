"""Engines at work, on a fake of TensorRT and CUDA that computes with ONNX Runtime.

The whole way from labels to an image has to give what the CPU backend gives; and whatever fails on
that way, nothing may be left on the device.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fake_tensorrt as trt
from fake_tensorrt import cudart, engine
from var_deploy import names
from var_deploy.bundle.files import GraphFile
from var_deploy.config import Layout
from var_deploy.errors import BackendError
from var_deploy.manifest import read_manifest
from var_deploy.runtime.backends.cuda import Cuda
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.backends.protocol import Array, Backend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.prompts import PromptRows
from var_deploy.runtime.tensorrt.engine_files import graph_profiles
from var_deploy.runtime.tensorrt.library import Library, load_library
from var_deploy.runtime.tensorrt.session import TensorRtBackend
from var_deploy.sampling import BitSampling, Sampling, uniforms

Bundle = Callable[..., Path]
Images = NDArray[np.float32]
LAYOUTS: tuple[Layout, ...] = ("per-scale", "shared")
RELEASES = {
    "cudaFree",
    "cudaFreeHost",
    "cudaStreamDestroy",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
}
SETTINGS = Sampling(cfg=0.0, top_k=0, top_p=0.95)
GUIDED = SETTINGS.replace(cfg=2.0)
manifest_of = cache(read_manifest)  # the bundles here do not change


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    cudart.reset()
    yield
    assert cudart.live() == {}, "something was left on the device"


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]
) -> Callable[..., Path]:
    """A small model in both precisions and layouts, exported once for each set of arguments."""
    pytest.importorskip("torch")
    from var_deploy.export.bundle import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("engines")

    @cache
    def export(batch: int = 1, guidance: bool = True, tiny: bool = False) -> Path:
        out = folder / f"{batch}-{guidance}-{tiny}"
        options = ExportOptions(precisions=("fp32", "fp16"), batch=batch, guidance=guidance)
        sizes = {"depth": 1, "patch_nums": (1, 2)} if tiny else {}
        export_bundle(small_model(**sizes), out, options)
        return out

    return export


def plan(bundle: Path, precision: str, graph: str, **changes: Any) -> bytes:
    """What the builder of the fake makes of a graph."""
    manifest = manifest_of(bundle)
    data = {
        "onnx": str(bundle / manifest.graph(precision, graph).file),
        "graph": graph,
        "profiles": graph_profiles(manifest, precision, graph),
        "version": trt.__version__,
        "sm": 87,
    }
    return b"FAKEPLAN" + json.dumps({**data, **changes}).encode()


def backend(bundle: Path, precision: str = "fp16", **options: Any) -> TensorRtBackend:
    return TensorRtBackend(
        Library(trt), lambda graph: plan(bundle, precision, graph), cuda=Cuda(cudart), **options
    )


def with_changed_plan(bundle: Path, graph: str, **changes: Any) -> TensorRtBackend:
    """As `backend`, with one plan that is not what it should be."""

    def plans(name: str) -> bytes:
        return plan(bundle, "fp16", name, **(changes if name == graph else {}))

    return TensorRtBackend(Library(trt), plans, cuda=Cuda(cudart))


def loop_of(
    bundle: Path, on: Backend, precision: str = "fp16", layout: Layout = "shared"
) -> ScaleLoop:
    return ScaleLoop(bundle, manifest_of(bundle), on, precision, layout)


def draw(loop: ScaleLoop, bundle: Path, seed: int, sampling: Sampling = SETTINGS) -> Images:
    manifest = manifest_of(bundle)
    labels = [(seed + n) % 5 for n in range(manifest.batch)]
    draws = [uniforms(seed, n, manifest.model.total_tokens) for n in range(manifest.batch)]
    return loop.run(labels, np.stack(draws), sampling).copy()


def cpu_images(
    bundle: Path, precision: str, layout: Layout, sampling: Sampling, seeds: range
) -> tuple[list[Images], list[NDArray[np.int64]]]:
    """What the CPU backend gives, and the last run's tokens."""
    loop = loop_of(bundle, OrtCpuBackend(1), precision, layout)
    try:
        return [draw(loop, bundle, seed, sampling) for seed in seeds], loop.tokens()
    finally:
        loop.close()


def refused(make: Callable[[], Any], *parts: str) -> str:
    """The one line that `make` fails with; nothing may be left while the error is still held."""
    with pytest.raises(BackendError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    assert cudart.live() == {}
    return text


# the same image as on the CPU


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("batch", "guidance"), [(1, False), (2, True)])
def test_images_are_those_of_the_cpu(
    bundle: Bundle, layout: Layout, precision: str, batch: int, guidance: bool
) -> None:
    folder, seeds = bundle(batch, guidance), range(3, 5)
    sampling = GUIDED if guidance else SETTINGS
    expected, tokens = cpu_images(folder, precision, layout, sampling, seeds)
    assert np.abs(expected[0] - expected[1]).max() > 0.1, "or the comparison would be hollow"
    loop = loop_of(folder, backend(folder, precision), precision, layout)
    for seed, wanted in zip(seeds, expected, strict=True):
        np.testing.assert_array_equal(draw(loop, folder, seed, sampling), wanted)
    for found, wanted_tokens in zip(loop.tokens(), tokens, strict=True):
        np.testing.assert_array_equal(found, wanted_tokens)
    loop.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_cuda_graphs_it_is_the_same_image(bundle: Bundle, layout: Layout) -> None:
    folder = bundle(1, False)
    expected, _ = cpu_images(folder, "fp16", layout, SETTINGS, range(7, 8))
    loop = loop_of(folder, backend(folder, cuda_graph=False), layout=layout)
    np.testing.assert_array_equal(draw(loop, folder, 7), expected[0])
    assert not [name for name in cudart.calls() if "Graph" in name or "Capture" in name]
    loop.close()


def test_the_gpt2_form(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.assemble import as_loaded_model
    from var_deploy.export.var import build, build_tokenizer

    torch.manual_seed(3)
    model = build(
        hidden_size=48, num_layers=2, num_heads=3, mlp_ratio=2.0, scales=(1, 2, 4), codebook_size=48
    )
    _, decoder = build_tokenizer(
        image_size=16, scales=(1, 2, 4), codebook_size=48, embed_dim=8, in_channels=1
    )
    options = ExportOptions(precisions=("fp16",), batch=2, guidance=False)
    export_bundle(as_loaded_model(model, decoder), tmp_path / "b", options)
    for layout in LAYOUTS:
        expected, _ = cpu_images(tmp_path / "b", "fp16", layout, SETTINGS, range(2, 3))
        loop = loop_of(tmp_path / "b", backend(tmp_path / "b"), layout=layout)
        np.testing.assert_array_equal(draw(loop, tmp_path / "b", 2), expected[0])
        loop.close()


def test_tensorrt_rtx_makes_its_kernels_before_they_are_recorded(bundle: Bundle) -> None:
    folder = bundle(1, True)
    module = types.ModuleType("tensorrt_rtx")
    strategies = engine.DynamicShapesKernelSpecializationStrategy
    vars(module).update(
        vars(trt),
        Runtime=engine.RtxRuntime,
        DynamicShapesKernelSpecializationStrategy=strategies,
    )
    rtx = TensorRtBackend(
        Library(module, "tensorrt_rtx"), lambda g: plan(folder, "fp16", g), cuda=Cuda(cudart)
    )
    expected, _ = cpu_images(folder, "fp16", "shared", GUIDED, range(1, 2))
    loop = loop_of(folder, rtx)
    np.testing.assert_array_equal(draw(loop, folder, 1, GUIDED), expected[0])
    assert rtx.describe()["backend"] == "tensorrt_rtx"
    loop.close()


# what goes to the device, and when


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_generation_is_one_copy_in_two_out_and_one_call_a_launch(
    bundle: Bundle, layout: Layout
) -> None:
    folder = bundle(2, True)
    loop = loop_of(folder, backend(folder), layout=layout)
    before = len(cudart.calls())
    draw(loop, folder, 1)
    assert cudart.calls()[before:] == [
        "cudaMemcpyAsync",
        *["cudaGraphLaunch"] * 5,  # condition, three scales, decoder
        *["cudaMemcpyAsync"] * 2,  # images with tokens, and f_hat
        "cudaStreamSynchronize",
    ]
    loop.close()


def test_rows_that_are_not_aligned_are_copied_after_each_launch(bundle: Bundle) -> None:
    # fp16, one row of 64: 128 bytes, so that scale 1 starts to write at byte 128
    folder = bundle(1, False)
    loop = loop_of(folder, backend(folder, cuda_graph=False))
    before = len(cudart.calls())
    draw(loop, folder, 1)
    run = [name for name in cudart.calls()[before:] if name != "cudaStreamSynchronize"]
    launch, copy = "execute_async_v3", "cudaMemcpyAsync"
    misaligned = [copy] * 4  # keys and values of two layers
    assert run == [copy, launch, launch, launch, *misaligned, launch, launch, copy, copy]
    loop.close()


def test_everything_runs_once_before_the_first_recording(bundle: Bundle) -> None:
    folder = bundle(1, True)
    loop = loop_of(folder, backend(folder))
    order = [
        name
        for name in cudart.calls()
        if name in ("execute_async_v3", "cudaStreamSynchronize", "cudaStreamBeginCapture")
    ]
    # condition, three scales, and the decoder on both places of f_hat
    recorded = ["cudaStreamBeginCapture", "execute_async_v3"] * 6
    assert order == [*["execute_async_v3"] * 6, "cudaStreamSynchronize", *recorded]
    loop.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contexts_share_their_scratch_memory(bundle: Bundle, layout: Layout) -> None:
    folder = bundle(1, True)
    loop = loop_of(folder, backend(folder), layout=layout)
    # the arena, given, made, latent, inner, geometry; scratch and spare: however many contexts
    assert cudart.live()["device memory"] == 8
    assert cudart.live()["execution context"] == 6
    assert cudart.live()["engine"] == (3 if layout == "shared" else 5)
    loop.close()


def test_it_says_what_it_runs_on(bundle: Bundle) -> None:
    with_graphs, without = backend(bundle()), backend(bundle(), cuda_graph=False)
    assert with_graphs.name == "tensorrt"
    assert with_graphs.describe() == {
        "backend": "tensorrt",
        "tensorrt": "10.3.0",
        "device": "Orin, 16 SMs (sm87)",
        "cuda_graph": "on",
    }
    assert without.describe()["cuda_graph"] == "off"
    with_graphs.close()
    without.close()


# whatever fails, nothing is left


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_leaks_whichever_call_fails(bundle: Bundle, layout: Layout) -> None:
    folder = bundle(1, False, tiny=True)

    def generate() -> int:
        """How many calls were made before the loop was closed."""
        loop = loop_of(folder, backend(folder), layout=layout)
        try:
            draw(loop, folder, 1)
            return len(cudart.calls())
        finally:
            loop.close()

    closing = generate()
    calls = cudart.calls()
    tried = 0
    for number, name in enumerate(calls):
        if name in RELEASES:
            continue
        cudart.reset()
        cudart.fail_at(number)
        error = None
        try:
            generate()
        except BackendError as caught:
            error = caught
        assert cudart.live() == {}, f"call {number}, {name}"
        assert (error is None) == (number >= closing), f"call {number}, {name}"
        if error is not None:
            assert name in str(error) or not name.startswith("cuda"), str(error)
            assert "\n" not in str(error)
        tried += 1
    assert tried > 70


@pytest.mark.parametrize("name", sorted(RELEASES - {"cudaGraphDestroy"}))
def test_a_release_that_fails_does_not_keep_the_others(bundle: Bundle, name: str) -> None:
    folder = bundle(1, True)
    loop = loop_of(folder, backend(folder))
    cudart.fail_on(name)
    loop.close()
    assert sum(cudart.live().values()) == 1
    cudart.reset()


def test_ctrl_c_leaves_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle(1, True)

    def interrupted(self: Any, stream_handle: int) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.IExecutionContext, "execute_async_v3", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop_of(folder, backend(folder))
    assert cudart.live() == {}


def test_closing_twice_and_closing_what_was_never_opened(bundle: Bundle) -> None:
    unused = backend(bundle())
    unused.close()
    unused.close()
    loop = loop_of(bundle(), backend(bundle()))
    loop.close()
    loop.close()


def test_a_session_can_go_before_the_others(bundle: Bundle) -> None:
    folder = bundle(1, True)
    trt_backend = backend(folder)
    paths = [folder / "fp16" / f"{graph}.onnx" for graph in ("step", "decoder")]
    sessions = [trt_backend.open(GraphFile.outside(path)) for path in paths]
    sessions[0].close()
    assert cudart.live()["engine"] == 1
    sessions[0].close()
    trt_backend.close()


# what is refused


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"version": "10.7.0"}, ("expecting library version 10.3.0 got 10.7.0",)),
        ({"sm": 86}, ("incompatible device", "8.7", "8.6")),
    ],
)
def test_a_plan_that_tensorrt_refuses(
    bundle: Bundle, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    folder = bundle(1, True)
    text = refused(
        lambda: loop_of(folder, with_changed_plan(folder, "step", **changes)), "step", *parts
    )
    assert "var-deploy build" in text


def test_a_plan_that_is_none(bundle: Bundle) -> None:
    folder = bundle(1, True)
    broken = TensorRtBackend(Library(trt), lambda graph: b"not a plan", cuda=Cuda(cudart))
    refused(lambda: loop_of(folder, broken), "decoder", "Magic tag does not match")


def test_a_plan_that_the_bundle_refuses_never_reaches_tensorrt(bundle: Bundle) -> None:
    def plans(graph: str) -> bytes:
        raise BackendError(f"{graph}.plan is damaged; run var-deploy build")

    folder = bundle(1, True)
    checked = TensorRtBackend(Library(trt), plans, cuda=Cuda(cudart))
    assert refused(lambda: loop_of(folder, checked)).startswith("decoder.plan is damaged")
    assert "deserialize_cuda_engine" not in cudart.calls()


def test_an_engine_of_another_type_is_refused_by_name(bundle: Bundle) -> None:
    folder = bundle(1, True)
    single = str(folder / "fp32" / "step.onnx")
    refused(
        lambda: loop_of(folder, with_changed_plan(folder, "step", onnx=single)),
        "step: past_key_values.0.key is float32 ",
        "in the engine and float16 ",
    )


def test_an_engine_of_another_size_is_refused_by_name(bundle: Bundle) -> None:
    folder, other = bundle(1, True), bundle(2, True)
    wide = str(other / "fp16" / "decoder.onnx")
    refused(
        lambda: loop_of(folder, with_changed_plan(folder, "decoder", onnx=wide)),
        "decoder: f_hat is float32 [2, 8, 4, 4] in the engine and float32 [1, 8, 4, 4]",
        "var-deploy build",
    )


def test_an_engine_without_the_profile_is_refused(bundle: Bundle) -> None:
    folder = bundle(1, True)
    profiles = graph_profiles(manifest_of(folder), "fp16", "step")[:2]
    refused(
        lambda: loop_of(folder, with_changed_plan(folder, "step", profiles=profiles)),
        "step: none of the engine's 2 profiles is for",
        "input [1, 16, 8]",
    )


def test_an_engine_of_another_graph_is_refused(bundle: Bundle) -> None:
    folder = bundle(1, True)
    last, first = (str(folder / "fp16" / f"scale_{k:02d}.onnx") for k in (2, 0))
    refused(
        lambda: loop_of(
            folder, with_changed_plan(folder, "scale_01", onnx=last), layout="per-scale"
        ),
        "scale_01: the output new_key_values.0.key is missing in the engine",
    )
    refused(
        lambda: loop_of(
            folder, with_changed_plan(folder, "scale_01", onnx=first), layout="per-scale"
        ),
        "scale_01: the input first_input is missing in the bundle",
    )


def test_a_tensor_that_would_lie_on_the_host_is_refused(bundle: Bundle) -> None:
    folder = bundle(1, True)
    refused(
        lambda: loop_of(folder, with_changed_plan(folder, "step", host=["top_k"])),
        "the engine of step wants top_k in the host's memory",
    )


def test_an_input_that_is_not_aligned_is_refused(bundle: Bundle) -> None:
    folder = bundle(1, True)
    trt_backend = backend(folder)
    session = trt_backend.open(GraphFile.outside(folder / "fp16" / "decoder.onnx"))
    place = trt_backend.allocate(4096)
    f_hat = Array(place.address + 4, (1, 8, 4, 4), np.dtype(np.float32), place.owner)
    with pytest.raises(BackendError, match=r"the input f_hat lies at 0x.* multiple of 256"):
        session.bind({names.F_HAT: f_hat}, {})
    trt_backend.close()


def test_a_shape_that_nobody_knows_beforehand_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle(1, True)
    known = engine.IExecutionContext.get_tensor_shape

    def unknown(self: Any, name: str) -> Any:
        return trt.builder.Dims((1, -1)) if name == names.TOKENS else known(self, name)

    monkeypatch.setattr(engine.IExecutionContext, "get_tensor_shape", unknown)
    refused(lambda: loop_of(folder, backend(folder)), "step: TensorRT cannot say the shape of toke")


def test_out_of_memory_says_how_much_there_was(bundle: Bundle) -> None:
    folder = bundle(1, True)
    cudart.set_memory(16 << 10)
    text = refused(
        lambda: loop_of(folder, backend(folder)),
        "cudaMalloc failed: cudaErrorMemoryAllocation (out of memory)",
    )
    assert "MB were asked for" in text


def test_a_failed_recording_names_the_way_out(bundle: Bundle) -> None:
    folder = bundle(1, True)
    broken = backend(folder)
    cudart.fail_on("cudaStreamEndCapture", cudart.cudaError_t.cudaErrorStreamCaptureInvalidated)
    refused(
        lambda: loop_of(folder, broken),
        "condition cannot be recorded as a CUDA graph (cudaStreamEndCapture failed: "
        "cudaErrorStreamCaptureInvalidated",
        "--no-cuda-graph",
    )


def test_a_launch_that_fails_says_so_in_tensorrts_words(bundle: Bundle) -> None:
    folder = bundle(1, True)
    broken = backend(folder, cuda_graph=False)
    cudart.fail_on("execute_async_v3")
    refused(
        lambda: loop_of(folder, broken),
        "tensorrt 10.3.0 failed in condition: IExecutionContext::enqueueV3: Error Code 1: Cuda",
    )


# the fake refuses what the real one refuses


@pytest.fixture
def context(bundle: Bundle) -> Iterator[Callable[..., Any]]:
    """A context of the decoder (f_hat in, image out) as it is made, on a stream of its own."""
    made: list[Any] = []

    def make(graph: str = "decoder", strategy: str = "USER_MANAGED") -> Any:
        library = Library(trt)
        library.logger.clear()
        runtime = trt.Runtime(library.logger)
        loaded = runtime.deserialize_cuda_engine(plan(bundle(1, True), "fp16", graph))
        assert loaded is not None
        kind = getattr(trt.ExecutionContextAllocationStrategy, strategy)
        made.append(loaded.create_execution_context(kind))
        return made[-1]

    yield make
    made.clear()
    cudart.reset()


@pytest.fixture
def stream() -> int:
    return int(cudart.cudaStreamCreateWithFlags(1)[1])


def block(size: int = 65536) -> int:
    return int(cudart.cudaMalloc(size)[1])


def said() -> str:
    return Library(trt).words()


def ready(context: Any) -> Any:
    """Everything that a decoder needs."""
    assert context.set_tensor_address(names.F_HAT, block())
    assert context.set_tensor_address(names.IMAGE, block())
    context.set_device_memory(block(), 65536)
    return context


def test_the_fake_runs_what_is_complete(context: Callable[..., Any], stream: int) -> None:
    assert ready(context()).execute_async_v3(stream)
    assert cudart.cudaStreamSynchronize(stream) == (cudart.cudaError_t.cudaSuccess,)


def test_the_fake_refuses_a_missing_address(context: Callable[..., Any], stream: int) -> None:
    decoder = context()
    decoder.set_device_memory(block(), 65536)
    assert not decoder.execute_async_v3(stream)
    assert "Address is not set for input tensor f_hat" in said()
    decoder.set_tensor_address(names.F_HAT, block())
    Library(trt).logger.clear()
    assert not decoder.execute_async_v3(stream)
    assert "Address is not set for output tensor image" in said()


def test_the_fake_refuses_a_misaligned_address(context: Callable[..., Any]) -> None:
    assert not context().set_tensor_address(names.F_HAT, block() + 128)
    assert "f_hat must be aligned on 256 byte boundary" in said()
    assert not context().set_tensor_address("no such tensor", block())


@pytest.mark.parametrize(("offset", "size"), [(256, 65536), (0, 16)])
def test_the_fake_refuses_unfit_scratch_memory(
    context: Callable[..., Any], stream: int, offset: int, size: int
) -> None:
    decoder = context()
    decoder.set_tensor_address(names.F_HAT, block())
    decoder.set_tensor_address(names.IMAGE, block())
    decoder.set_device_memory(block(1 << 20) + offset, size)
    assert "setDeviceMemory" in said()
    assert not decoder.execute_async_v3(stream), "it has none"


def test_the_fake_needs_scratch_memory_only_where_the_user_manages_it(
    context: Callable[..., Any], stream: int
) -> None:
    decoder = context(strategy="STATIC")
    decoder.set_tensor_address(names.F_HAT, block())
    decoder.set_tensor_address(names.IMAGE, block())
    assert decoder.execute_async_v3(stream)


def test_the_fake_sees_freed_memory(context: Callable[..., Any], stream: int) -> None:
    decoder = ready(context())
    assert decoder.execute_async_v3(stream)
    cudart.cudaStreamSynchronize(stream)
    cudart.cudaFree(decoder.get_tensor_address(names.F_HAT))
    with pytest.raises(AssertionError, match="illegal memory access"):
        decoder.execute_async_v3(stream)


def test_the_fake_sees_overlapping_outputs(context: Callable[..., Any], stream: int) -> None:
    decoder = ready(context())
    decoder.set_tensor_address(names.IMAGE, decoder.get_tensor_address(names.F_HAT))
    with pytest.raises(AssertionError, match="overlaps"):
        decoder.execute_async_v3(stream)


def test_the_fake_refuses_a_capture_without_a_run_before(
    context: Callable[..., Any], stream: int
) -> None:
    decoder, handle = ready(context()), stream
    thread_local = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    cudart.cudaStreamBeginCapture(handle, thread_local)
    assert not decoder.execute_async_v3(stream)
    assert "not permitted when stream is capturing" in said()
    code, graph = cudart.cudaStreamEndCapture(handle)
    assert code == cudart.cudaError_t.cudaErrorStreamCaptureInvalidated
    assert graph is None
    assert decoder.execute_async_v3(stream), "the stream is itself again"


def test_the_fake_refuses_shapes_outside_the_profile(
    context: Callable[..., Any], stream: int
) -> None:
    step = context("step")
    assert names.INPUT in step.infer_shapes()
    assert tuple(step.get_tensor_shape(names.TOKENS)) == (1, -1)
    assert not step.set_input_shape(names.INPUT, (1, 4, 8)), "profile 0 is scale 0"
    assert "does not satisfy any optimization profiles" in said()
    assert not step.set_input_shape(names.TOKENS, (1, 4))
    assert step.set_optimization_profile_async(1, stream)
    assert step.set_input_shape(names.INPUT, (1, 4, 8))
    with pytest.raises(RuntimeError):
        step.set_optimization_profile_async(3, stream)
    with pytest.raises(AssertionError, match="crashed"):
        step.set_optimization_profile_async(2, stream)


def test_the_fake_refuses_to_run_without_shapes(context: Callable[..., Any], stream: int) -> None:
    step = context("step")
    step.set_device_memory(block(), 65536)
    assert not step.execute_async_v3(stream)
    assert "is not set" in said()


def test_the_fake_sees_work_that_outlives_its_context(bundle: Bundle, stream: int) -> None:
    library = Library(trt)
    runtime = trt.Runtime(library.logger)
    loaded = runtime.deserialize_cuda_engine(plan(bundle(1, True), "fp16", "decoder"))
    assert loaded is not None
    decoder = ready(
        loaded.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    )
    assert decoder.execute_async_v3(stream)
    del decoder
    with pytest.raises(AssertionError, match="released before its work was done"):
        cudart.cudaStreamSynchronize(stream)
    cudart.reset()


def test_a_runtime_that_does_not_start(bundle: Bundle) -> None:
    folder = bundle(1, True)
    broken = backend(folder)
    cudart.fail_on("Runtime")
    refused(lambda: loop_of(folder, broken), "tensorrt cannot run on this machine", "nullptr")


# the real library, as far as it goes without a GPU


def test_the_real_library_says_why_it_takes_no_plan(bundle: Bundle) -> None:
    name = "tensorrt_rtx"
    pytest.importorskip(name, reason=f"{name} is not installed")
    real = TensorRtBackend(load_library(name), lambda graph: b"not a plan", cuda=Cuda(cudart))
    refused(
        lambda: loop_of(bundle(1, True), real),
        f"{name} {load_library(name).version} does not load the engine of decoder: ",
        "Error Code 2: Internal Error",
    )


# the fake has nothing that the real one lacks


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_names_are_those_of_the_library(module: str) -> None:
    real = pytest.importorskip(module, reason=f"{module} is not installed: nothing to compare with")
    rtx = module == "tensorrt_rtx"
    pairs = [
        (engine.RtxRuntime if rtx else engine.Runtime, real.Runtime),
        (engine.RtxEngine if rtx else engine.ICudaEngine, real.ICudaEngine),
        (engine.IExecutionContext, real.IExecutionContext),
    ]
    if rtx:
        pairs.append((engine.IRuntimeConfig, real.IRuntimeConfig))
    for fake, original in pairs:
        lacking = {name for name in dir(fake) if not name.startswith("_")} - set(dir(original))
        assert not lacking, original.__name__
    for kind in (
        engine.DataType,
        engine.TensorIOMode,
        engine.TensorLocation,
        engine.ExecutionContextAllocationStrategy,
    ):
        assert set(kind.__members__) <= set(getattr(real, kind.__name__).__members__)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_model_draws_the_golden_bits(tmp_path: Path, layout: Layout) -> None:
    """Condition graphs write halves of one buffer; `step` has five open sizes; then without, and
    again with a negative prompt."""
    pytest.importorskip("torch")
    from golden_infinity import OWN, load_case

    from var_deploy.export.bundle import ExportOptions, export_bundle

    case, bundle = load_case(OWN / "seeded-small"), tmp_path / "text"
    export_bundle(case.model(), bundle, ExportOptions(batch=2, guidance=None))
    golden, config = case.golden, case.config
    rows = PromptRows(features=golden["text.features"], lengths=golden["text.lengths"])
    negative = PromptRows(
        features=golden["negative.text.features"], lengths=golden["negative.text.lengths"]
    )
    sampling = BitSampling(cfg=tuple(config["cfg"]), temperature=tuple(config["tau"]), top_p=0.1)
    draws = np.full((2, case.spec.draws), 0.5, np.float32)
    loop = loop_of(bundle, backend(bundle, "fp32"), "fp32", layout)
    for kind, given in (
        ("greedy", rows),
        ("negative", dataclasses.replace(rows, negative=negative)),
        ("greedy", rows),
    ):
        loop.run(given, draws, sampling)
        for scale, tokens in enumerate(loop.tokens()):
            np.testing.assert_array_equal(tokens, golden[f"{kind}.bits.{scale}"])
    loop.close()
