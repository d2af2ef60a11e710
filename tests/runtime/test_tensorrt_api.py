"""The stand-ins for TensorRT and CUDA have nothing that the real modules lack.

Our code runs against the stand-ins in the other tests, so whatever it calls is theirs; here their
names are looked up in TensorRT for RTX, in the bindings of standard TensorRT (whose library is not
installed here: its names are read out of the file) and in cuda-python.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import fake_tensorrt
from fake_tensorrt import cudart

# flags of TensorRT 10 that later ones dropped; the stand-in knows them in order to refuse them
DROPPED = {("BuilderFlag", "FP16"), ("BuilderFlag", "INT8")}
DROPPED |= {("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH")}


def public(cls: type) -> list[str]:
    return sorted(
        name
        for name, value in inspect.getmembers_static(cls)
        if not name.startswith("_") and value is not getattr(IntEnum, name, None)
    )


def surface() -> list[tuple[str, str]]:
    """(class, attribute) of everything that the stand-in offers."""
    pairs = []
    for name in sorted(set(fake_tensorrt.__all__) - {"__version__"}):
        cls = getattr(fake_tensorrt, name)
        pairs += [(name, attribute) for attribute in own(cls)]
    return pairs


def own(cls: type) -> list[str]:
    """Attributes that a class of ours adds to those of Python's."""
    if issubclass(cls, IntEnum):
        return [member.name for member in cls]
    return [
        name
        for name in public(cls)
        if not hasattr(object, name) and not _helper(getattr(cls, name, None))
    ]


def _helper(value: Any) -> bool:
    """What the stand-ins share among themselves, marked by where it is defined."""
    return getattr(value, "__module__", "") == "fake_tensorrt.cudart"


@cache
def names_in_bindings() -> bytes:
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or found.origin is None:
        pytest.skip("tensorrt_cu13_bindings is not installed")
    return (Path(found.origin).parent / "tensorrt.so").read_bytes()


def test_there_is_a_surface() -> None:
    pairs = surface()
    assert ("IExecutionContext", "execute_async_v3") in pairs
    assert ("Builder", "build_serialized_network") in pairs
    assert ("OnnxParser", "parse_from_file") in pairs
    assert len(pairs) > 60
    assert set(pairs) > DROPPED


def test_tensorrt_rtx_has_it_all() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    lacking = {
        (name, attribute)
        for name, attribute in surface()
        if not hasattr(getattr(trt, name, None), attribute)
    }
    assert lacking == DROPPED


def test_tensorrt_11_has_it_all() -> None:
    words = names_in_bindings()
    lacking = {
        (name, attribute)
        for name, attribute in surface()
        # linkers store strings that end alike once, so only the end of a name is certain
        if not all(word.encode() + b"\0" in words for word in (name, attribute))
    }
    assert lacking <= DROPPED, "names of another class may hide a dropped one, so not =="
    assert b"execute_async_v2\0" not in words, "a name that 11 dropped, so this can fail"


def test_cuda_python_has_it_all() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    runtime = importlib.import_module("cuda.bindings.runtime")
    used = [n for n in vars(cudart) if n.startswith("cuda") and callable(getattr(cudart, n))]
    assert "cudaGraphLaunch" in used
    assert [name for name in used if not hasattr(runtime, name)] == []
