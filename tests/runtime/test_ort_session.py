"""Sessions of ONNX Runtime: what it refuses is one BackendError, and it writes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from var_deploy.bundle.files import BundleFiles, GraphFile
from var_deploy.errors import BackendError, BundleError
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.blocks import SharedBlock

ExportTo = Callable[..., Path]


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """What C code writes counts as well."""
    yield
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.fixture
def decoder(export_to: ExportTo) -> GraphFile:
    bundle = export_to()
    return BundleFiles(bundle, read_manifest(bundle), "fp32").graph("decoder")


def refused(words: str, work: Callable[[], object]) -> None:
    with pytest.raises(BackendError, match=words) as caught:
        work()
    assert str(caught.value).isprintable()


def test_buffers_that_do_not_fit(decoder: GraphFile) -> None:
    backend = OrtCpuBackend(1)
    (info,) = (i for i in read_manifest(decoder.path.parents[1]).graph("fp32", "decoder").inputs)
    shape = tuple(int(n) for n in info.shape)
    good = SharedBlock(backend, {"f_hat": (shape, np.float32)})
    other = SharedBlock(backend, {"x": (shape, np.float32)})
    short = SharedBlock(backend, {"f_hat": ((1, 2), np.float32)})
    half = SharedBlock(backend, {"f_hat": (shape, np.float16)})
    session = backend.open(decoder)
    refused("refuses buffers of decoder: ", lambda: session.bind(other, {}))
    refused("refuses buffers of decoder: ", lambda: session.bind(good, {"x": other["x"]}))
    for block in (short, half):
        refused("(refuses buffers of|failed in) decoder: ", lambda b=block: session.bind(b, {})())


def test_memory_that_there_is_not() -> None:
    backend = OrtCpuBackend(1)
    refused("there is no memory for .* MB of buffers", lambda: backend.allocate(1 << 60))
    refused("there is no memory for .* MB of buffers", lambda: backend.share(1 << 62))


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        OrtCpuBackend(1).open(GraphFile.outside(tmp_path / "x.onnx"))
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    graph = GraphFile.outside(tmp_path / "x.onnx")
    refused("ONNX Runtime refuses x.onnx", lambda: OrtCpuBackend(1).open(graph))
    session = OrtCpuBackend(2).open(graph)  # loaded by a thread: whoever waits for it is told
    for _ in range(2):
        refused("ONNX Runtime refuses x.onnx", lambda: session.bind({}, {}))
    session.close()


def test_a_session_is_asked_for_twice(
    export_to: ExportTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at paths once more, which fails while a bundle is being renamed."""
    real, failures = onnxruntime.InferenceSession, ["no such path", "no such path"]

    def session(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise RuntimeError(failures.pop())
        return real(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    refused("no such path", lambda: Pipeline.load(export_to(), "onnxruntime-cpu", threads=1))
    failures.append("no such path")
    Pipeline.load(export_to(), "onnxruntime-cpu", threads=1).close()
    assert not failures
