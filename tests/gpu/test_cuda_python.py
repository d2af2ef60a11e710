"""The calls of cuda-python that the runtime makes, on a real GPU."""

from __future__ import annotations

import numpy as np
import pytest

from var_deploy.errors import BackendError
from var_deploy.runtime.backends.cuda import Cuda, PinnedMemory, load_api

SIZE = 1 << 20


def filled(cuda: Cuda, first: int = 0) -> PinnedMemory:
    """Memory of both sides that holds a pattern on the host."""
    shared = cuda.share(SIZE)
    shared.host[...] = (np.arange(SIZE) + first) % 251
    return shared


def test_device_memory_starts_as_zeros_at_aligned_addresses(cuda: Cuda) -> None:
    back = filled(cuda)
    for size in (1, 255, 257, SIZE):
        block = cuda.allocate(size)
        assert block.address % 256 == 0
        cuda.copy(back.address, block.address, size)
        back.download()
        cuda.synchronize()
        assert not back.host[:size].any()


def test_page_locked_memory_goes_to_the_device_and_back(cuda: Cuda) -> None:
    shared = filled(cuda)
    expected = shared.host.copy()
    shared.upload()
    cuda.synchronize()
    shared.host[...] = 0
    shared.download()
    cuda.synchronize()
    np.testing.assert_array_equal(shared.host, expected)


def test_copies_happen_in_the_order_of_the_calls(cuda: Cuda) -> None:
    one, other, place = filled(cuda, 0), filled(cuda, 7), cuda.allocate(SIZE)
    one.upload()
    other.upload()
    for source in (one, other, one, other):
        cuda.copy(place.address, source.address, SIZE)
    cuda.copy(one.address, place.address, SIZE)
    one.download()
    cuda.synchronize()
    np.testing.assert_array_equal(one.host, other.host)


def test_a_graph_runs_when_it_is_launched_and_not_when_it_is_recorded(cuda: Cuda) -> None:
    source, target = filled(cuda), cuda.share(SIZE)
    source.upload()
    cuda.synchronize()
    graph = cuda.capture(lambda: cuda.copy(target.address, source.address, SIZE))
    target.download()
    cuda.synchronize()
    assert not target.host.any()
    for first in (0, 3):  # the recording holds addresses, not values
        source.host[...] = (np.arange(SIZE) + first) % 251
        source.upload()
        graph()
        target.download()
        cuda.synchronize()
        np.testing.assert_array_equal(target.host, source.host)
    graph.close()


def test_a_recording_that_fails_leaves_a_stream_that_works(cuda: Cuda) -> None:
    with pytest.raises(BackendError, match="cudaStreamSynchronize failed: cudaErrorStreamCapture"):
        cuda.capture(cuda.synchronize)  # waiting is not allowed in a recording
    shared = filled(cuda)
    shared.upload()
    shared.download()
    cuda.synchronize()
    graph = cuda.capture(lambda: cuda.copy(shared.address, shared.address + 512, 256))
    graph()
    cuda.synchronize()


def test_events_time_what_lies_between_them(cuda: Cuda) -> None:
    clock, block = cuda.clock(), cuda.allocate(1 << 28)
    half = block.nbytes // 2

    def laps() -> list[float]:
        clock.mark()
        cuda.copy(block.address, block.address + half, half)
        clock.mark()
        for _ in range(20):
            cuda.copy(block.address, block.address + half, half)
        clock.mark()
        return clock.laps()

    laps()
    one, many = laps()
    assert 0 < one < many
    clock.close()


def test_too_much_memory_is_refused_with_what_there_is(cuda: Cuda) -> None:
    with pytest.raises(BackendError, match=r"cudaErrorMemoryAllocation .*MB are free"):
        cuda.allocate(1 << 46)
    assert cuda.allocate(SIZE).nbytes == SIZE  # the error is not found again by the next call


def test_everything_is_given_back(cuda: Cuda) -> None:
    free, total = cuda.free_memory()
    assert 0 < free <= total
    other = Cuda()
    other.share(1 << 28)
    assert cuda.free_memory()[0] <= free - (1 << 28)
    other.close()
    assert free - cuda.free_memory()[0] <= 1 << 21  # what CUDA hands out at a time


def test_the_device_has_a_name_and_a_compute_capability(cuda: Cuda) -> None:
    name, sm = cuda.device_name_and_sm()
    assert name.endswith(" SMs")
    assert sm >= 50
    api = load_api()
    assert api.cudaGetLastError()[0] == api.cudaError_t.cudaSuccess
