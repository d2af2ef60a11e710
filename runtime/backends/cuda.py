"""CUDA through cuda-python: device memory, one stream and CUDA graphs, without PyTorch or CuPy.

Every function of `cuda.bindings.runtime` returns a tuple that starts with an error code. A code
other than cudaSuccess becomes a BackendError with the name of the function.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import BackendError, one_line
from var_deploy.host.installation import pip_command
from var_deploy.runtime.backends.protocol import Array

MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # the second before cuda-python 12.6.1
DEVICE = 0  # the first GPU that CUDA sees; CUDA_VISIBLE_DEVICES selects another
MB = 2**20


class Owned:
    """A CUDA resource: its handle, and the name of the function that releases it."""

    def __init__(self, release: str, handle: Any) -> None:
        self.release, self.handle = release, handle


class Cuda:
    """The first GPU: allocates memory as `backends.protocol.Memory` defines it, on one stream.

    All work goes to this stream, so it runs in the order of the calls. `close` releases all
    resources, newest first; host arrays of `share` must not be used after it.

    Args:
        api: the module `cuda.bindings.runtime` or a stand-in; None imports it.

    Raises BackendError where cuda-python is missing or finds no GPU.
    """

    def __init__(self, api: Any = None) -> None:
        self._api = api or load_api()
        self._owned: list[Owned] = []
        self._closed = False
        self._call("cudaSetDevice", DEVICE)
        # not the default stream: that one cannot be captured, and waits for all others
        self._stream = self._own(
            "cudaStreamDestroy", "cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking
        ).handle

    @property
    def stream(self) -> int:
        """The stream's handle as an int, as other libraries expect it."""
        return int(self._stream)

    def allocate(self, size: int) -> Array:
        """Allocate `size` zero bytes of device memory, aligned to 256 bytes, as CUDA guarantees."""
        try:
            address = int(self._own("cudaFree", "cudaMalloc", max(size, 1)).handle)
        except BackendError as error:
            raise BackendError(f"{error}; {self._shortage(size)}") from None
        self._call("cudaMemsetAsync", address, 0, size, self._stream)
        return Array(address, (size,), np.dtype(np.uint8), self)

    def share(self, size: int) -> PinnedMemory:
        """Allocate `size` zero bytes both in device memory and in page-locked host memory."""
        flags = self._api.cudaHostAllocDefault
        host = self._own("cudaFreeHost", "cudaHostAlloc", max(size, 1), flags).handle
        return PinnedMemory(self, int(host), self.allocate(size))

    def synchronize(self) -> None:
        """Wait for the stream. Raises BackendError for work that failed on the device meanwhile."""
        self._call("cudaStreamSynchronize", self._stream)

    def clock(self) -> CudaClock:
        """A clock that marks moments on the stream; close it before this object."""
        return CudaClock(self.stream, self._api)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes between two addresses, on the device or in page-locked host memory.

        The copy runs on the stream, in order with the other work.
        """
        # with unified addressing CUDA derives the direction from the pointers
        direction = self._api.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, size, direction, self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record the work that `work` puts on the stream as a CUDA graph, without running it."""
        # thread-local: CUDA calls of other threads do not disturb the capture
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._abandon_capture()
            raise
        graph = self._own("cudaGraphDestroy", "cudaStreamEndCapture", self._stream)
        try:
            # not cudaGraphInstantiate, whose arguments changed from CUDA 11 to 12
            made = self._own(
                "cudaGraphExecDestroy", "cudaGraphInstantiateWithFlags", graph.handle, 0
            )
        finally:
            self.give_back(graph)
        return Graph(self, made)

    def launch(self, graph: Owned) -> None:
        self._call("cudaGraphLaunch", graph.handle, self._stream)

    def give_back(self, owned: Owned) -> None:
        """Release one resource before `close` does; does nothing where it was released already."""
        if owned in self._owned:
            self._owned.remove(owned)
            self._release(owned)

    def device_name_and_sm(self) -> tuple[str, int]:
        """Name of the GPU and its compute capability, 87 for 8.7; see `device_name_and_sm`."""
        return device_name_and_sm(self._api)

    def free_memory(self) -> tuple[int, int]:
        """Free and total device memory in bytes."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def close(self) -> None:
        """Release all resources, newest first; safe to call twice.

        Raises nothing: a failure here would only hide the error that caused the closing.
        """
        if not self._closed:
            with contextlib.suppress(BackendError):
                self.synchronize()  # no resource may be in use when it is released
        while self._owned:
            self._release(self._owned.pop())
        self._closed = True

    def _own(self, release: str, name: str, *arguments: Any) -> Owned:
        """Call `name`, and keep the resource that it returns until `close`."""
        owned = Owned(release, self._call(name, *arguments))
        self._owned.append(owned)
        return owned

    def _release(self, owned: Owned) -> None:
        with contextlib.suppress(BackendError):
            self._call(owned.release, owned.handle)

    def _abandon_capture(self) -> None:
        """End a capture that failed, so that the stream runs work again."""
        with contextlib.suppress(BackendError):
            self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self._stream))

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._closed:
            raise BackendError(f"{name} was called after the GPU's memory was given back")
        return call(self._api, name, *arguments)

    def _shortage(self, size: int) -> str:
        wanted = f"{size / MB:.1f} MB were asked for"
        try:
            free, total = self.free_memory()
        except BackendError:
            return wanted
        return f"{wanted}, {free / MB:.0f} of {total / MB:.0f} MB are free"


class PinnedMemory:
    """`Shared` memory of host and GPU: page-locked, so that copies run asynchronously."""

    def __init__(self, cuda: Cuda, host: int, device: Array) -> None:
        self._cuda, self._host_address, self._device = cuda, host, device
        block = (ctypes.c_uint8 * device.nbytes).from_address(host)
        self.host: NDArray[np.uint8] = np.ctypeslib.as_array(block)
        self.host[...] = 0

    @property
    def address(self) -> int:
        return self._device.address

    def upload(self) -> None:
        self._cuda.copy(self.address, self._host_address, self._device.nbytes)

    def download(self) -> None:
        self._cuda.copy(self._host_address, self.address, self._device.nbytes)


class Graph:
    """An instantiated CUDA graph. Calling it launches all recorded work at once."""

    def __init__(self, cuda: Cuda, made: Owned) -> None:
        self._cuda, self._made = cuda, made

    def __call__(self) -> None:
        self._cuda.launch(self._made)

    def close(self) -> None:
        self._cuda.give_back(self._made)


class CudaMemory:
    """Implements `backends.protocol.Memory` for a backend that owns a `Cuda`."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def allocate(self, size: int) -> Array:
        return self._cuda.allocate(size)

    def share(self, size: int) -> PinnedMemory:
        return self._cuda.share(size)

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def discard(self, array: Array) -> None:
        """Do nothing: CUDA graphs hold the addresses of the memory, so it cannot be returned."""

    def clock(self) -> CudaClock:
        return self._cuda.clock()


class CudaClock:
    """A `Clock` of CUDA events on the stream of the launches; marking does not wait.

    Args:
        stream: handle of the stream.
        api: the module `cuda.bindings.runtime` or a stand-in; None imports it.
    """

    source = "CUDA events"

    def __init__(self, stream: int, api: Any = None) -> None:
        self.each = False
        self._api, self._stream = api or load_api(), stream
        self._events: list[Any] = []
        self._used = 0

    def mark(self) -> None:
        if self._used == len(self._events):
            self._events.append(call(self._api, "cudaEventCreate"))
        call(self._api, "cudaEventRecord", self._events[self._used], self._stream)
        self._used += 1

    def laps(self) -> list[float]:
        events, self._used = self._events[: self._used], 0
        if not events:
            return []
        call(self._api, "cudaEventSynchronize", events[-1])
        pairs = pairwise(events)
        return [1e-3 * float(call(self._api, "cudaEventElapsedTime", *pair)) for pair in pairs]

    def close(self) -> None:
        while self._events:
            call(self._api, "cudaEventDestroy", self._events.pop())


def load_api() -> Any:
    """Import `cuda.bindings.runtime`. Raises BackendError that says what to install."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a shared library that is missing, of any exception type
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                continue
            raise BackendError(
                f"{name} is installed but does not load ({one_line(error)}); {_remedy()}"
            ) from None
    raise BackendError(f"cuda-python is not installed; {_remedy()}")


def _remedy() -> str:
    """The command that installs a cuda-python that fits the driver."""
    return (
        f"run {pip_command('cuda-python<13')} for a driver of CUDA 12 (JetPack 6), "
        f"{pip_command('cuda-python')} for CUDA 13 (JetPack 7)"
    )


def device_name_and_sm(api: Any = None) -> tuple[str, int]:
    """Name of the first GPU and its compute capability, 87 for 8.7. Raises BackendError.

    The name ends in the number of multiprocessors: all Orin boards have the name "Orin", and an
    engine that was tuned for 16 multiprocessors is not the best one for 8.
    """
    found = call(api or load_api(), "cudaGetDeviceProperties", DEVICE)
    name = bytes(found.name).rstrip(b"\0").decode(errors="replace")
    name = f"{name}, {int(found.multiProcessorCount)} SMs"
    return name, 10 * int(found.major) + int(found.minor)


def call(api: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime and return its result, a tuple where there are several.

    Raises BackendError with the name of the function and CUDA's message.
    """
    code, *results = getattr(api, name)(*arguments)
    if code == api.cudaError_t.cudaSuccess:
        return results[0] if len(results) == 1 else tuple(results)
    # clear the error, or the next library that checks for its own errors would report it
    api.cudaGetLastError()
    words = [api.cudaGetErrorName(code)[1], api.cudaGetErrorString(code)[1]]
    title, text = (w.decode(errors="replace") if isinstance(w, bytes) else str(w) for w in words)
    hint = ""
    if title == "cudaErrorInsufficientDriver":
        hint = f"; NVIDIA's driver is missing or older than cuda-python; {_remedy()}"
    raise BackendError(f"{name} failed: {title} ({text}){hint}")
