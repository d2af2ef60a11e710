"""Prints the CUDA driver's version and its GPUs as JSON: `python -m var_deploy.host.cuda_driver`.

It needs only the driver's library, neither the CUDA toolkit nor a Python package, and creates no
context on the GPU. It runs as a program of its own, so that a driver that hangs or crashes does not
affect the caller. Functions and numbers are those of the CUDA driver API (cuda.h).
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

from var_deploy.host.machine import NO_DRIVER

# CUdevice_attribute
CLOCK_RATE, MULTIPROCESSORS, INTEGRATED = 13, 16, 18  # the clock in kHz
MEMORY_CLOCK_RATE, BUS_WIDTH = 36, 37  # kHz, bits
MAJOR, MINOR = 75, 76  # compute capability
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class DriverError(Exception):
    """A function of the driver returned an error."""


def describe(load: Callable[[str], Any] = ctypes.CDLL) -> dict[str, Any]:
    """The fields of `machine.Driver` as JSON values: cuda, gpus, problem."""
    try:
        library = load("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return {"problem": NO_DRIVER}
    found: dict[str, Any] = {}
    try:
        version = _number(library, "cuDriverGetVersion")
        found["cuda"] = f"{version // 1000}.{version % 1000 // 10}"
        _call(library, "cuInit", 0)
        count = _number(library, "cuDeviceGetCount")
        found["gpus"] = [_gpu(library, index) for index in range(count)]
    except DriverError as error:
        found["problem"] = str(error)
    return found


def _gpu(library: Any, index: int) -> dict[str, Any]:
    device = _number(library, "cuDeviceGet", index)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(library, "cuDeviceGetName", name, len(name), device)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)

    def attribute(which: int) -> int:
        return _number(library, "cuDeviceGetAttribute", which, device)

    return {
        "name": name.value.decode(errors="replace"),
        "memory": memory.value,
        "sm": 10 * attribute(MAJOR) + attribute(MINOR),
        "multiprocessors": attribute(MULTIPROCESSORS),
        "clock": 1e3 * attribute(CLOCK_RATE),
        "memory_clock": 1e3 * attribute(MEMORY_CLOCK_RATE),
        "bus_bits": attribute(BUS_WIDTH),
        "integrated": bool(attribute(INTEGRATED)),
    }


def _number(library: Any, call: str, *arguments: Any) -> int:
    """Call a function that writes an int through its first argument; returns the int."""
    result = ctypes.c_int()
    _call(library, call, ctypes.byref(result), *arguments)
    return result.value


def _call(library: Any, call: str, *arguments: Any) -> None:
    code = getattr(library, call)(*arguments)
    if code == NO_DEVICE:
        raise DriverError("the CUDA driver sees no GPU")
    if code:
        raise DriverError(f"{call} failed with CUDA error {code}")


if __name__ == "__main__":
    print(json.dumps(describe()))
