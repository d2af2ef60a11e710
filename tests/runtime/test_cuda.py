"""Memory, stream and graphs of the GPU, on a fake of `cuda.bindings.runtime`."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import var_deploy.runtime.backends.cuda as module
from fake_tensorrt import cudart
from var_deploy.errors import BackendError
from var_deploy.runtime.backends.cuda import Cuda, device_name_and_sm, load_api
from var_deploy.runtime.blocks import SharedBlock

Error = cudart.cudaError_t
OK = Error.cudaSuccess
THREAD_LOCAL = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
DEFAULT = cudart.cudaMemcpyKind.cudaMemcpyDefault


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    cudart.reset()
    yield


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    made = Cuda(cudart)
    yield made
    made.close()
    assert cudart.live() == {}, "something was left on the device"


def on_device(cuda: Cuda, address: int, size: int) -> NDArray[np.uint8]:
    cuda.synchronize()
    return cudart.view(address, size).copy()


# memory


@pytest.mark.parametrize("size", [1, 255, 256, 1000])
def test_memory_is_zeros_at_an_aligned_address(cuda: Cuda, size: int) -> None:
    blocks = [cuda.allocate(size) for _ in range(3)]
    for block in blocks:
        assert block.address % 256 == 0
        assert (block.shape, block.dtype) == ((size,), np.uint8)
        assert not on_device(cuda, block.address, size).any()
    assert len({block.address for block in blocks}) == 3


def test_nothing_is_nothing(cuda: Cuda) -> None:
    assert cuda.allocate(0).nbytes == 0


def test_shared_memory_goes_both_ways(cuda: Cuda) -> None:
    shared = cuda.share(600)
    assert shared.host.shape == (600,)
    assert not shared.host.any()
    assert shared.address % 256 == 0
    shared.host[...] = np.arange(600) % 251
    shared.upload()
    assert (on_device(cuda, shared.address, 600) == shared.host).all()
    cudart.view(shared.address, 600)[...] = 7
    shared.download()
    assert not (shared.host == 7).all(), "nobody has waited for it yet"
    cuda.synchronize()
    assert (shared.host == 7).all()


def test_copies_are_in_order_with_each_other(cuda: Cuda) -> None:
    shared, block = cuda.share(512), cuda.allocate(512)
    shared.host[...] = 5
    shared.upload()
    cuda.copy(block.address + 256, shared.address, 100)
    cuda.copy(shared.address, block.address, 512)
    shared.download()
    cuda.synchronize()
    assert (shared.host[256:356] == 5).all()
    assert shared.host.sum() == 500


def test_blocks_of_the_loop_lie_in_it(cuda: Cuda) -> None:
    block = SharedBlock(cuda, {"a": ((3,), np.float32), "b": ((), np.int64)})
    block.host["a"][...] = (1.5, 2.5, 3.5)
    block.host["b"][...] = -4
    block.upload()
    found = on_device(cuda, block["a"].address, 12).view(np.float32)
    assert found.tolist() == [1.5, 2.5, 3.5]
    assert on_device(cuda, block["b"].address, 8).view(np.int64).tolist() == [-4]


def test_free_memory_and_the_name_of_the_device(cuda: Cuda) -> None:
    free, total = cuda.free_memory()
    assert free == total
    cuda.allocate(1 << 20)
    assert cuda.free_memory() == (free - (1 << 20), total)
    assert cuda.device_name_and_sm() == device_name_and_sm(cudart) == ("Orin, 16 SMs", 87)
    cudart.set_device(b"NVIDIA RTX 5090\0\0", 12, 0)
    assert cuda.device_name_and_sm() == ("NVIDIA RTX 5090, 16 SMs", 120)


def test_the_stream_is_not_the_default_one(cuda: Cuda) -> None:
    assert cuda.stream != 0


# graphs


def test_a_graph_repeats_what_was_recorded(cuda: Cuda) -> None:
    source, target = cuda.share(256), cuda.allocate(256)
    source.host[...] = 1
    source.upload()
    graph = cuda.capture(lambda: cuda.copy(target.address, source.address, 256))
    assert not on_device(cuda, target.address, 256).any(), "recorded, not run"
    for value in (2, 3):
        source.host[...] = value
        source.upload()
        graph()
        assert (on_device(cuda, target.address, 256) == value).all()
    graph.close()
    graph.close()
    assert "executable graph" not in cudart.live()


@pytest.mark.parametrize("forbidden", ["allocate", "synchronize"])
def test_what_a_recording_may_not_do_is_refused(cuda: Cuda, forbidden: str) -> None:
    def work() -> None:
        cuda.allocate(16) if forbidden == "allocate" else cuda.synchronize()

    with pytest.raises(BackendError, match="not permitted when stream is capturing"):
        cuda.capture(work)
    cuda.allocate(16)
    cuda.synchronize()  # the stream is itself again


def test_a_recording_that_is_broken_off_leaves_a_stream_that_works(cuda: Cuda) -> None:
    def work() -> None:
        cuda.copy(block.address, block.address + 128, 16)
        raise KeyboardInterrupt

    block = cuda.allocate(256)
    with pytest.raises(KeyboardInterrupt):
        cuda.capture(work)
    assert set(cudart.live()) == {"stream", "device memory"}
    cuda.capture(lambda: None)()
    cuda.synchronize()


# errors


def failing_calls() -> dict[str, Callable[[Cuda], object]]:
    def capture(cuda: Cuda) -> object:
        return cuda.capture(lambda: None)

    return {
        "cudaMalloc": lambda cuda: cuda.allocate(16),
        "cudaMemsetAsync": lambda cuda: cuda.allocate(16),
        "cudaHostAlloc": lambda cuda: cuda.share(16),
        "cudaMemcpyAsync": lambda cuda: cuda.share(16).upload(),
        "cudaStreamSynchronize": lambda cuda: cuda.synchronize(),
        "cudaStreamBeginCapture": capture,
        "cudaStreamEndCapture": capture,
        "cudaGraphInstantiateWithFlags": capture,
        "cudaGraphLaunch": lambda cuda: cuda.capture(lambda: None)(),
        "cudaMemGetInfo": lambda cuda: cuda.free_memory(),
        "cudaGetDeviceProperties": lambda cuda: cuda.device_name_and_sm(),
    }


@pytest.mark.parametrize("name", failing_calls())
def test_a_failing_call_is_named(cuda: Cuda, name: str) -> None:
    cudart.fail_on(name, Error.cudaErrorInvalidValue)
    with pytest.raises(BackendError) as caught:
        failing_calls()[name](cuda)
    text = str(caught.value)
    assert text.startswith(f"{name} failed: cudaErrorInvalidValue (invalid argument)")
    # a library that asks for the last error later must not find this one
    assert cudart.cudaGetLastError() == (OK,)


@pytest.mark.parametrize("name", ["cudaSetDevice", "cudaStreamCreateWithFlags"])
def test_without_a_device_there_is_nothing(name: str) -> None:
    cudart.fail_on(name, Error.cudaErrorNoDevice)
    with pytest.raises(BackendError, match=f"{name} failed: cudaErrorNoDevice"):
        Cuda(cudart)
    assert cudart.live() == {}


def test_a_driver_that_is_too_old_is_told_what_fits_it() -> None:
    cudart.fail_on("cudaSetDevice", Error.cudaErrorInsufficientDriver)
    with pytest.raises(BackendError, match=r"insufficient .*; run .*pip install .cuda-python<13"):
        Cuda(cudart)


def test_out_of_memory_says_how_much_there_is(cuda: Cuda) -> None:
    cudart.set_memory(8 << 20)
    cuda.allocate(5 << 20)
    text = (
        "cudaMalloc failed: cudaErrorMemoryAllocation (out of memory); 4.0 MB were asked for, "
        "3 of 8 MB are free"
    )
    with pytest.raises(BackendError, match=f"^{re.escape(text)}$"):
        cuda.allocate(4 << 20)
    cuda.allocate(3 << 20)


def test_the_shortage_is_told_even_where_the_device_says_no_more(cuda: Cuda) -> None:
    cudart.set_memory(1 << 20)
    cudart.fail_on("cudaMemGetInfo")
    with pytest.raises(BackendError, match=r"out of memory\); 4.0 MB were asked for$"):
        cuda.allocate(4 << 20)


# release


def test_release_is_in_reverse_order() -> None:
    cuda = Cuda(cudart)
    cuda.allocate(16)
    cuda.share(16)
    cuda.capture(lambda: None)
    before = len(cudart.calls())
    cuda.close()
    assert cudart.calls()[before:] == [
        "cudaStreamSynchronize",
        "cudaGraphExecDestroy",
        "cudaFree",  # the device's part of what is shared
        "cudaFreeHost",
        "cudaFree",
        "cudaStreamDestroy",
    ]
    cuda.close()
    assert cudart.calls()[before + 6 :] == []
    assert cudart.live() == {}


def test_after_closing_nothing_reaches_the_device() -> None:
    cuda = Cuda(cudart)
    shared = cuda.share(16)
    cuda.close()
    for work in (lambda: cuda.allocate(16), shared.upload, cuda.synchronize):
        with pytest.raises(BackendError, match="after the GPU's memory was given back"):
            work()


def test_a_release_that_fails_does_not_keep_the_rest() -> None:
    cuda = Cuda(cudart)
    for _ in range(3):
        cuda.allocate(16)
    cudart.fail_on("cudaFree")
    cuda.close()
    assert cudart.live() == {"device memory": 1}


def test_work_that_waits_is_done_before_its_memory_goes() -> None:
    cuda = Cuda(cudart)
    block = cuda.allocate(1 << 16)
    cuda.copy(block.address, block.address + 256, 256)
    cuda.close()
    assert cudart.live() == {}


# the module itself


def test_without_cuda_python_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ModuleNotFoundError("No module named 'cuda'", name="cuda")

    monkeypatch.setattr(module.importlib, "import_module", missing)
    text = r'not installed; run .*pip install "cuda-python<13" .*JetPack 6.*JetPack 7'
    with pytest.raises(BackendError, match=text):
        Cuda()


def test_a_broken_cuda_python_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise ImportError("libcudart.so.12: cannot open\nshared object file")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    text = r"cuda.bindings.runtime is installed but does not load \(libcudart.so.12: cannot open sh"
    with pytest.raises(BackendError, match=text):
        load_api()


def test_an_older_cuda_python_has_another_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").touch()
    (tmp_path / "cuda" / "cudart.py").write_text("old = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load_api().old
    finally:
        for name in ("cuda", "cuda.cudart"):
            sys.modules.pop(name, None)


USED = [
    name
    for name in dir(cudart)
    if name.startswith("cuda") and inspect.isfunction(getattr(cudart, name))
]


@pytest.fixture(scope="module")
def real() -> Any:
    name = "cuda.bindings.runtime"
    return pytest.importorskip(name, reason="cuda-python is not installed: nothing to compare with")


def test_every_call_is_among_those_compared() -> None:
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', Path(module.__file__).read_text()))
    assert len(called) > 10
    assert called - {"cudaErrorInsufficientDriver"} <= set(USED)


@pytest.mark.parametrize("name", USED)
def test_functions_take_what_the_real_ones_take(real: Any, name: str) -> None:
    fake, original = (inspect.signature(getattr(m, name)) for m in (cudart, real))
    assert list(fake.parameters) == list(original.parameters)


@pytest.mark.parametrize("name", USED)
def test_functions_return_as_many_values_as_the_real_ones(real: Any, name: str) -> None:
    special = {
        "kind": lambda m: m.cudaMemcpyKind.cudaMemcpyDefault,
        "mode": lambda m: m.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
        "error": lambda m: m.cudaError_t.cudaErrorInvalidValue,
    }
    parameters = inspect.signature(getattr(real, name)).parameters
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("with a GPU here these calls would do something")
    given = [special[p](real) if p in special else 0 for p in parameters]
    answer = getattr(real, name)(*given)
    cudart.fail_on(name)
    mine = [special[p](cudart) if p in special else 0 for p in parameters]
    assert len(getattr(cudart, name)(*mine)) == len(answer)


def test_numbers_are_those_of_the_real_module(real: Any) -> None:
    for kind in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        for name, member in getattr(cudart, kind).__members__.items():
            assert int(getattr(getattr(real, kind), name)) == member, name
    for name in ("cudaStreamNonBlocking", "cudaHostAllocDefault"):
        assert getattr(real, name) == getattr(cudart, name)
    properties = real.cudaDeviceProp()
    assert isinstance(properties.name, bytes)
    assert {"major", "minor"} <= set(dir(properties))
    assert int(real.cudaStream_t(0)) == 0
    for code, words in cudart.WORDS.items():
        found = real.cudaGetErrorString(real.cudaError_t(int(code)))[1].decode()
        assert found == words, code.name


# the fake refuses what CUDA refuses


@pytest.fixture
def stream() -> Any:
    return cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)[1]


def test_the_fake_sees_a_double_free() -> None:
    address = cudart.cudaMalloc(64)[1]
    assert cudart.cudaFree(address) == (OK,)
    assert cudart.cudaFree(address) == (Error.cudaErrorInvalidValue,)
    assert cudart.cudaFreeHost(cudart.cudaMalloc(64)[1]) == (Error.cudaErrorInvalidValue,)


def test_the_fake_sees_copies_out_of_range(stream: Any) -> None:
    one, two = cudart.cudaMalloc(512)[1], cudart.cudaMalloc(1024)[1]
    invalid = (Error.cudaErrorInvalidValue,)
    assert cudart.cudaMemcpyAsync(one, two, 1024, DEFAULT, stream) == invalid
    assert cudart.cudaMemcpyAsync(two, one + 256, 512, DEFAULT, stream) == invalid
    assert cudart.cudaMemsetAsync(one + 1, 0, 512, stream) == invalid
    wrong_way = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert cudart.cudaMemcpyAsync(one, two, 16, wrong_way, stream) == invalid
    with pytest.raises(TypeError):
        cudart.cudaMemcpyAsync(one, two, 16, 4, stream)


def test_the_fake_sees_memory_that_was_freed(stream: Any) -> None:
    one, two = cudart.cudaMalloc(512)[1], cudart.cudaMalloc(512)[1]
    cudart.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    cudart.cudaMemcpyAsync(one, two, 512, DEFAULT, stream)
    graph = cudart.cudaStreamEndCapture(stream)[1]
    made = cudart.cudaGraphInstantiateWithFlags(graph, 0)[1]
    cudart.cudaFree(two)
    cudart.cudaGraphLaunch(made, stream)
    with pytest.raises(AssertionError, match="after they were freed"):
        cudart.cudaStreamSynchronize(stream)
    with pytest.raises(AssertionError, match="illegal memory access"):
        cudart.view(two, 1)


def test_the_fake_sees_what_was_destroyed(stream: Any) -> None:
    cudart.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    graph = cudart.cudaStreamEndCapture(stream)[1]
    with pytest.raises(TypeError, match="instantiated"):
        cudart.cudaGraphLaunch(graph, stream)
    made = cudart.cudaGraphInstantiateWithFlags(graph, 0)[1]
    cudart.cudaGraphDestroy(graph)
    assert cudart.cudaGraphLaunch(made, stream) == (OK,), "it does not need the graph any more"
    cudart.cudaGraphExecDestroy(made)
    for destroy in (
        lambda: cudart.cudaGraphLaunch(made, stream),
        lambda: cudart.cudaGraphExecDestroy(made),
        lambda: cudart.cudaGraphDestroy(graph),
    ):
        with pytest.raises(AssertionError, match="after it was destroyed"):
            destroy()
    cudart.cudaStreamDestroy(stream)
    with pytest.raises(AssertionError, match="does not exist"):
        cudart.cudaStreamSynchronize(stream)


def test_the_fake_keeps_the_rules_of_a_capture(stream: Any) -> None:
    assert cudart.cudaStreamEndCapture(stream) == (Error.cudaErrorIllegalState, None)
    cudart.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert cudart.cudaStreamBeginCapture(stream, THREAD_LOCAL) == (Error.cudaErrorIllegalState,)
    unsupported = Error.cudaErrorStreamCaptureUnsupported
    assert cudart.cudaMalloc(16) == (unsupported, None)
    assert cudart.cudaStreamSynchronize(stream) == (unsupported,)
    invalidated = Error.cudaErrorStreamCaptureInvalidated
    assert cudart.cudaStreamEndCapture(stream) == (invalidated, None)


def test_the_fake_gives_garbage_and_counts_what_lives(stream: Any) -> None:
    address = cudart.cudaMalloc(100)[1]
    assert (cudart.view(address, 100) == cudart.GARBAGE).all()
    cudart.cudaHostAlloc(10, 0)
    assert cudart.live() == {"stream": 1, "device memory": 1, "pinned memory": 1}
    assert cudart.cudaHostAlloc(10, 4)[0] == Error.cudaErrorInvalidValue
    assert cudart.cudaSetDevice(1) == (Error.cudaErrorInvalidDevice,)
