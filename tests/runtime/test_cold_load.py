"""Graphs are opened while weights are hashed, and weights that have not changed are not hashed."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from var_deploy.bundle import hash_record
from var_deploy.bundle.files import BundleFiles, GraphFile
from var_deploy.bundle.hash_record import RECENT
from var_deploy.errors import BackendError, BundleError
from var_deploy.files import held_files
from var_deploy.files.held_files import HeldFile
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime import weights_check
from var_deploy.runtime.backends import onnxruntime_cpu
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend, OrtLaunch

pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")

WEIGHTS = "fp32/weights.bin"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]) -> Path:
    from var_deploy.export.bundle import ExportOptions, export_bundle

    bundle = tmp_path_factory.mktemp("cold") / "bundle"
    model = small_model(1, depth=1, patch_nums=(1, 2))
    export_bundle(model, bundle, ExportOptions(layout="shared"))
    return bundle


@pytest.fixture
def bundle(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy, in a process that has hashed and opened nothing, with a record of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    held_files.discard_hashes()
    moment = time.time() + RECENT + 1
    monkeypatch.setattr(hash_record.time, "time", lambda: moment)
    yield Path(shutil.copytree(exported, tmp_path / "bundle"))
    gc.collect()
    assert not onnxruntime_cpu._sessions


@pytest.fixture
def weights_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Bytes of the weights that were read, to be hashed, since the last call; what this process
    knows of hashes is forgotten."""
    size, read, real = (bundle / WEIGHTS).stat().st_size, list[int](), os.read

    def counted(file: int, most: int) -> bytes:
        data = real(file, most)
        read.append(len(data) if os.fstat(file).st_size == size else 0)
        return data

    def since() -> int:
        held_files.discard_hashes()
        found = sum(read)
        read.clear()
        return found

    monkeypatch.setattr(os, "read", counted)
    return since


def load(bundle: Path, **options: Any) -> Pipeline:
    return Pipeline.load(bundle, "onnxruntime-cpu", threads=2, **options)


def image(bundle: Path, **options: Any) -> bytes:
    with load(bundle, **options) as pipe:
        return pipe.generate([1], seed=3).tobytes()


def damage(bundle: Path) -> None:
    """Change a byte of the weights, and set the time of the last write back."""
    path = bundle / WEIGHTS
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(5)
        byte = stream.read(1)[0]
        stream.seek(5)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_weights_are_hashed_once_until_they_change(
    bundle: Path, weights_read: Callable[[], int]
) -> None:
    size = (bundle / WEIGHTS).stat().st_size
    first = image(bundle)
    assert weights_read() == size
    assert image(bundle) == first
    assert weights_read() == 0, "the record knows them"
    assert image(bundle, check="hashes") == first
    assert weights_read() == size, "everything is read"
    (bundle / WEIGHTS).touch()
    assert image(bundle) == first
    assert weights_read() == size


@pytest.mark.parametrize("check", ["changed", "hashes"])
def test_a_change_is_found_in_spite_of_the_record(bundle: Path, check: str) -> None:
    image(bundle)
    held_files.discard_hashes()
    damage(bundle)
    with pytest.raises(BundleError, match=r"weights\.bin does not match its hash"):
        load(bundle, check=check)


def test_graphs_are_read_whatever_the_record_says(bundle: Path) -> None:
    image(bundle)
    graph = bundle / "fp32" / "step.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"step\.onnx does not match its hash"):
        load(bundle)


def test_weights_are_looked_at_once_as_well(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are finite is a fact about their content."""
    looked = list[int]()
    is_finite = weights_check.is_finite
    monkeypatch.setattr(weights_check, "is_finite", lambda x: looked.append(1) or is_finite(x))
    image(bundle)
    assert looked
    looked.clear()
    image(bundle)
    assert not looked
    image(bundle, check="hashes")
    assert looked


class Held:
    """Holds hashing up until `go`, and notes what was opened and launched meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.opened, self.launched = threading.Event(), list[str](), list[str]()
        hashing, opening, calling = HeldFile.sha256, OrtCpuBackend._load, OrtLaunch.__call__

        def sha256(file: HeldFile, *rest: Any, **more: Any) -> Any:
            assert self.go.wait(60)
            return hashing(file, *rest, **more)

        def opened(backend: OrtCpuBackend, graph: GraphFile) -> Any:
            session = opening(backend, graph)
            self.opened.append(graph.ref.name)
            return session

        def launched(launch: OrtLaunch) -> None:
            self.launched.append(launch._graph)
            calling(launch)

        monkeypatch.setattr(HeldFile, "sha256", sha256)
        monkeypatch.setattr(OrtCpuBackend, "_load", opened)
        monkeypatch.setattr(OrtLaunch, "__call__", launched)

    def wait_for_sessions(self) -> None:
        end = time.monotonic() + 60
        while len(self.opened) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert sorted(self.opened) == ["condition", "decoder", "step"]


@pytest.fixture
def held(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    found = Held(monkeypatch)
    yield found
    found.go.set()  # so that no thread waits for a test that failed


def test_no_graph_runs_before_the_hashes_were_compared(bundle: Path, held: Held) -> None:
    images = list[bytes]()
    thread = threading.Thread(target=lambda: images.append(image(bundle)))
    thread.start()
    held.wait_for_sessions()  # beside the hashing, which has not begun
    thread.join(0.2)
    assert thread.is_alive() and not held.launched
    held.go.set()
    thread.join(60)
    assert len(images) == 1 and held.launched


def test_sessions_over_damaged_weights_are_released(bundle: Path, held: Held) -> None:
    damage(bundle)
    errors = list[str]()

    def attempt() -> None:
        with pytest.raises(BundleError) as caught:
            load(bundle)
        errors.append(str(caught.value))

    thread = threading.Thread(target=attempt)
    thread.start()
    held.wait_for_sessions()
    held.go.set()
    thread.join(60)
    assert len(errors) == 1 and "weights.bin does not match its hash" in errors[0]
    assert not held.launched


def test_damage_is_the_reason_where_opening_fails_too(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library may stumble over the damage before the hash shows it."""

    def refuses(*_: Any, **__: Any) -> Any:
        raise BackendError("ONNX Runtime refuses step.onnx")

    damage(bundle)
    monkeypatch.setattr(onnxruntime_cpu, "open_session", refuses)
    with pytest.raises(BundleError, match="does not match its hash"):
        load(bundle)


def test_weights_that_change_while_graphs_are_opened(
    bundle: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even to what the manifest lists: a session may have read what was there before."""
    damage(bundle)
    found = list[bytes]()
    loads, real = list[int](), BundleFiles.begin_check

    def counted(*rest: Any, **how: Any) -> None:
        loads.append(1)
        real(*rest, **how)

    monkeypatch.setattr(BundleFiles, "begin_check", counted)
    thread = threading.Thread(target=lambda: found.append(image(bundle)))
    thread.start()
    held.wait_for_sessions()
    damage(bundle)  # back to what it was
    held.go.set()
    thread.join(60)
    assert loads == [1, 1], "loaded once more, from the beginning"
    assert found == [image(bundle)]


def test_a_hard_link_that_is_made_while_graphs_are_opened(
    bundle: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `var-deploy triton`: it changes the times of the file, and nothing that matters."""
    found, loads, real = list[bytes](), list[bool](), BundleFiles.begin_check

    def counted(files: BundleFiles, then: Any = None, *, beside: bool = True) -> None:
        loads.append(beside)
        real(files, then, beside=beside)
        if not beside:
            os.link(bundle / WEIGHTS, bundle.with_name("link-2"))

    monkeypatch.setattr(BundleFiles, "begin_check", counted)
    thread = threading.Thread(target=lambda: found.append(image(bundle)))
    thread.start()
    held.wait_for_sessions()
    os.link(bundle / WEIGHTS, bundle.with_name("link-1"))
    held.go.set()
    thread.join(60)
    assert loads == [True, False], "loaded once more, in the way that links do not disturb"
    assert found == [image(bundle)]


def test_a_load_that_is_interrupted_does_not_wait_for_the_hash(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = BundleFiles(bundle, read_manifest(bundle), "fp32")
    begun, go = threading.Event(), threading.Event()
    read = os.read

    def slowly(file: int, most: int) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go.wait(60)
            return read(file, 1)  # byte by byte: it would take as good as forever
        return read(file, most)

    monkeypatch.setattr(os, "read", slowly)
    files.begin_check()
    assert begun.wait(60)
    threading.Timer(0.1, go.set).start()
    files.close()
    with pytest.raises(BundleError, match="was closed while it was read"):
        files.verified()
