"""Stands for `cuda.bindings.runtime`: what the runtime uses of it, with a GPU made of host memory.

Names, arguments and tuples are the real ones. Work on a stream happens when somebody waits for it,
not before, so that a result read too early is wrong here too; new device memory holds garbage.
What CUDA answers with an error code is answered so, and what is undefined there (a use after free,
a copy out of range) raises AssertionError.

For tests: `reset`, `live`, `calls`, `fail_at`, `fail_on`, `set_device`, `set_memory`.
"""

# ruff: noqa: N801, N802, N816 - the names are CUDA's

from __future__ import annotations

import functools
import math
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 512  # what cudaMalloc really gives
GARBAGE = 0xAB
cudaStreamNonBlocking = 1
cudaHostAllocDefault = 0
Work = Callable[[], None]


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalState = 401
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorUnknown = 999


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


WORDS = {
    cudaError_t.cudaErrorInvalidValue: "invalid argument",
    cudaError_t.cudaErrorMemoryAllocation: "out of memory",
    cudaError_t.cudaErrorInsufficientDriver: (
        "CUDA driver version is insufficient for CUDA runtime version"
    ),
    cudaError_t.cudaErrorNoDevice: "no CUDA-capable device is detected",
    cudaError_t.cudaErrorStreamCaptureUnsupported: (
        "operation not permitted when stream is capturing"
    ),
    cudaError_t.cudaErrorStreamCaptureInvalidated: (
        "operation failed due to a previous error during capture"
    ),
}


class Handle:
    """A pointer to something of the driver's."""

    def __init__(self) -> None:
        _state.handles += 16
        self._number = 0x1000 + _state.handles

    def __int__(self) -> int:
        return self._number


class cudaStream_t(Handle):
    pass


class cudaGraph_t(Handle):
    def __init__(self, nodes: Sequence[Work]) -> None:
        super().__init__()
        self._nodes = nodes


class cudaGraphExec_t(cudaGraph_t):
    pass


class cudaDeviceProp:
    def __init__(self, name: bytes, major: int, minor: int) -> None:
        self.name, self.major, self.minor = name, major, minor
        self.multiProcessorCount = 16


class RefusedError(Exception):
    """CUDA answers with an error code."""

    def __init__(self, code: cudaError_t) -> None:
        self.code = code


class Block:
    """One allocation, of a kind: device or pinned."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size
        whole = np.full(size + ALIGNMENT, GARBAGE, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT
        self.bytes = whole[start : start + size]
        self.address = int(whole.ctypes.data) + start


class Stream:
    """Work that waits, and what is being recorded."""

    def __init__(self) -> None:
        self.waiting: deque[Work] = deque()
        self.recording: list[Work] | None = None
        self.spoiled = False  # the recording

    def run(self) -> None:
        while self.waiting:
            self.waiting.popleft()()


class State:
    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.freed: list[Block] = []  # kept, so that a test that reads one does not crash
        self.streams: dict[int, Stream] = {}
        self.alive: Counter[str] = Counter()
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.fail_on: tuple[str, cudaError_t] | None = None
        self.handles = 0
        self.last_error = cudaError_t.cudaSuccess
        self.device = (b"Orin", 8, 7)
        self.total = 1 << 33


_state = State()


# for tests and for the engines of this package


def reset() -> None:
    """A GPU that nobody has used."""
    global _state
    _state = State()


def live() -> dict[str, int]:
    """What was not given back, by kind; empty where nothing leaks."""
    return dict(+_state.alive)


def calls() -> list[str]:
    """Every call so far, CUDA's and TensorRT's, in order."""
    return list(_state.calls)


def fail_at(number: int | None) -> None:
    """Let the call with this number, counted from now, fail (CUDA's or TensorRT's); once."""
    _state.fail_at = None if number is None else len(_state.calls) + number


def fail_on(name: str, code: cudaError_t = cudaError_t.cudaErrorUnknown) -> None:
    """Let the next call of this name fail."""
    _state.fail_on = (name, code)


def set_device(name: bytes, major: int, minor: int) -> None:
    _state.device = (name, major, minor)


def set_memory(total: int) -> None:
    _state.total = total


def planted(name: str) -> cudaError_t | None:
    """Count a call; the error it shall end with, if a test asked for one."""
    number = len(_state.calls)
    _state.calls.append(name)
    if number == _state.fail_at:
        return cudaError_t.cudaErrorUnknown
    if _state.fail_on is not None and _state.fail_on[0] == name:
        code, _state.fail_on = _state.fail_on[1], None
        return code
    return None


class Counted:
    """An object of TensorRT that holds memory for as long as it lives."""

    def __init__(self, kind: str) -> None:
        counter = _state.alive
        counter[kind] += 1
        weakref.finalize(self, lambda: counter.subtract([kind])).atexit = False


def view(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes of device memory at an address, for whoever runs on the device."""
    block = _block(address, size)
    if block is None or block.kind != "device memory":
        raise AssertionError(f"illegal memory access: {size} bytes at {address:#x}")
    return block.bytes[address - block.address :][:size]


def enqueue(stream: int, work: Work) -> None:
    """Let work happen on a stream, or record it where the stream is being captured."""
    entry = _stream(stream)
    if entry.recording is None:
        entry.waiting.append(work)
    else:
        entry.recording.append(work)


def capturing(stream: int) -> bool:
    return _stream(stream).recording is not None


def spoil(stream: int) -> None:
    """What a forbidden call does to a capture."""
    _stream(stream).spoiled = True


# the API


def api(results: int = 0, *, captured: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """A function of CUDA: (error, *results), None for results where it failed.

    Args:
        captured: whether it is allowed while a stream is being captured.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any) -> tuple[Any, ...]:
            code = planted(function.__name__)
            busy = [s for s in _state.streams.values() if s.recording is not None]
            try:
                if code is not None:
                    if function is cudaStreamEndCapture.__wrapped__:
                        for stream in busy:
                            stream.recording = None  # whatever it answers, the capture is over
                    raise RefusedError(code)
                if busy and not captured:
                    for stream in busy:
                        stream.spoiled = True
                    raise RefusedError(cudaError_t.cudaErrorStreamCaptureUnsupported)
                found = function(*arguments)
            except RefusedError as refused:
                _state.last_error = refused.code
                return (refused.code, *[None] * results)
            values = (found,) if results == 1 else (found or ())
            return (cudaError_t.cudaSuccess, *values)

        return call

    return wrap


@api()
def cudaSetDevice(device: int) -> None:
    if device != 0:
        raise RefusedError(cudaError_t.cudaErrorInvalidDevice)


@api(1)
def cudaGetDeviceProperties(device: int) -> cudaDeviceProp:
    if device != 0:
        raise RefusedError(cudaError_t.cudaErrorInvalidDevice)
    return cudaDeviceProp(*_state.device)


@api(2)
def cudaMemGetInfo() -> tuple[int, int]:
    return _free(), _state.total


@api(1, captured=False)
def cudaMalloc(size: int) -> int:
    if size > _free():
        raise RefusedError(cudaError_t.cudaErrorMemoryAllocation)
    return _allocate("device memory", size)


@api(captured=False)
def cudaFree(devPtr: int) -> None:
    _give_back("device memory", devPtr)


@api(1, captured=False)
def cudaHostAlloc(size: int, flags: int) -> int:
    if flags != cudaHostAllocDefault:
        raise RefusedError(cudaError_t.cudaErrorInvalidValue)
    return _allocate("pinned memory", size)


@api(captured=False)
def cudaFreeHost(ptr: int) -> None:
    _give_back("pinned memory", ptr)


@api()
def cudaMemsetAsync(devPtr: int, value: int, count: int, stream: cudaStream_t) -> None:
    if _block(devPtr, count) is None:
        raise RefusedError(cudaError_t.cudaErrorInvalidValue)

    def work() -> None:
        view(devPtr, count)[...] = value

    enqueue(int(stream), work)


@api()
def cudaMemcpyAsync(
    dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: cudaStream_t
) -> None:
    if not isinstance(kind, cudaMemcpyKind):
        raise TypeError(f"Argument 'kind' is not instance of 'cudaMemcpyKind' (got {kind!r})")
    target, source = _block(dst, count), _block(src, count)
    if target is None or source is None:
        raise RefusedError(cudaError_t.cudaErrorInvalidValue)
    device = (source.kind == "device memory", target.kind == "device memory")
    meant = {
        cudaMemcpyKind.cudaMemcpyHostToDevice: (False, True),
        cudaMemcpyKind.cudaMemcpyDeviceToHost: (True, False),
        cudaMemcpyKind.cudaMemcpyDeviceToDevice: (True, True),
    }
    if meant.get(kind, device) != device:
        raise RefusedError(cudaError_t.cudaErrorInvalidValue)

    def work() -> None:
        _bytes(dst, count)[...] = _bytes(src, count)

    enqueue(int(stream), work)


@api(1, captured=False)
def cudaStreamCreateWithFlags(flags: int) -> cudaStream_t:
    if flags not in (0, cudaStreamNonBlocking):
        raise RefusedError(cudaError_t.cudaErrorInvalidValue)
    made = cudaStream_t()
    _state.streams[int(made)] = Stream()
    _state.alive["stream"] += 1
    return made


@api()
def cudaStreamDestroy(stream: cudaStream_t) -> None:
    _stream(int(stream)).run()
    del _state.streams[int(stream)]
    _state.alive["stream"] -= 1


@api(captured=False)
def cudaStreamSynchronize(stream: cudaStream_t) -> None:
    _stream(int(stream)).run()


@api()
def cudaStreamBeginCapture(stream: cudaStream_t, mode: cudaStreamCaptureMode) -> None:
    entry = _stream(int(stream))
    if not isinstance(mode, cudaStreamCaptureMode):
        raise TypeError(f"Argument 'mode' is not instance of 'cudaStreamCaptureMode' ({mode!r})")
    if entry.recording is not None:
        raise RefusedError(cudaError_t.cudaErrorIllegalState)
    entry.recording, entry.spoiled = [], False


@api(1)
def cudaStreamEndCapture(stream: cudaStream_t) -> cudaGraph_t:
    entry = _stream(int(stream))
    if entry.recording is None:
        raise RefusedError(cudaError_t.cudaErrorIllegalState)
    nodes, entry.recording = entry.recording, None
    if entry.spoiled:
        raise RefusedError(cudaError_t.cudaErrorStreamCaptureInvalidated)
    _state.alive["graph"] += 1
    return cudaGraph_t(nodes)


@api(1)
def cudaGraphInstantiateWithFlags(graph: cudaGraph_t, flags: int) -> cudaGraphExec_t:
    made = cudaGraphExec_t(_nodes(graph))
    _state.alive["executable graph"] += 1
    return made


@api()
def cudaGraphLaunch(graphExec: cudaGraphExec_t, stream: cudaStream_t) -> None:
    if not isinstance(graphExec, cudaGraphExec_t):
        raise TypeError("a graph has to be instantiated before it is launched")
    for node in _nodes(graphExec):
        enqueue(int(stream), node)


@api()
def cudaGraphDestroy(graph: cudaGraph_t) -> None:
    _nodes(graph)
    del graph._nodes
    _state.alive["graph"] -= 1


@api()
def cudaGraphExecDestroy(graphExec: cudaGraphExec_t) -> None:
    _nodes(graphExec)
    del graphExec._nodes
    _state.alive["executable graph"] -= 1


class cudaEvent_t:
    at: float | None = None


@api(1)
def cudaEventCreate() -> cudaEvent_t:
    _state.alive["event"] += 1
    return cudaEvent_t()


@api()
def cudaEventRecord(event: cudaEvent_t, stream: cudaStream_t) -> None:
    enqueue(int(stream), lambda: setattr(event, "at", time.perf_counter()))


@api(captured=False)
def cudaEventSynchronize(event: cudaEvent_t) -> None:
    for stream in _state.streams.values():
        stream.run()


@api(1)
def cudaEventElapsedTime(start: cudaEvent_t, end: cudaEvent_t) -> float:
    assert start.at is not None and end.at is not None, "asked before the work was done"
    return 1e3 * (end.at - start.at)


@api()
def cudaEventDestroy(event: cudaEvent_t) -> None:
    _state.alive["event"] -= 1


def cudaGetLastError() -> tuple[cudaError_t]:
    code, _state.last_error = _state.last_error, cudaError_t.cudaSuccess
    return (code,)


def cudaGetErrorName(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return cudaError_t.cudaSuccess, error.name.encode()


def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return cudaError_t.cudaSuccess, WORDS.get(error, "unknown error").encode()


def _free() -> int:
    return _state.total - sum(b.size for b in _state.blocks if b.kind == "device memory")


def _block(address: int, size: int) -> Block | None:
    """The allocation that the whole range lies in."""
    for block in _state.blocks:
        if block.address <= address and address + size <= block.address + block.size:
            return block
    return None


def _bytes(address: int, size: int) -> NDArray[np.uint8]:
    block = _block(address, size)
    if block is None:
        raise AssertionError(f"copy of {size} bytes at {address:#x} after they were freed")
    return block.bytes[address - block.address :][:size]


def _allocate(kind: str, size: int) -> int:
    block = Block(kind, math.ceil(size / ALIGNMENT) * ALIGNMENT)
    _state.blocks.append(block)
    _state.alive[kind] += 1
    return block.address


def _give_back(kind: str, address: int) -> None:
    for stream in _state.streams.values():
        stream.run()  # CUDA waits for the device before it frees
    for number, block in enumerate(_state.blocks):
        if block.address == address and block.kind == kind:
            _state.freed.append(_state.blocks.pop(number))
            block.bytes[...] = GARBAGE
            _state.alive[kind] -= 1
            return
    raise RefusedError(cudaError_t.cudaErrorInvalidValue)


def _stream(number: int) -> Stream:
    if number not in _state.streams:
        raise AssertionError(f"stream {number:#x} does not exist, or no longer")
    return _state.streams[number]


def _nodes(graph: cudaGraph_t) -> Sequence[Work]:
    if not hasattr(graph, "_nodes"):
        raise AssertionError("a graph was used or destroyed after it was destroyed")
    return graph._nodes
