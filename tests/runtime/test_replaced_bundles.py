"""A bundle that is replaced or changed while it is read or used is never mixed with another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fuzz.harness import scaled
from var_deploy import pipeline as pipeline_module
from var_deploy.bundle.files import BundleFiles
from var_deploy.errors import BundleChangedError, BundleError
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline

pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")

WEIGHTS = "fp32/weights.bin"


@dataclass(frozen=True)
class Generation:
    """A bundle, and what it computes."""

    bundle: Path
    digest: str
    image: NDArray[np.uint8]
    tokens: tuple[NDArray[np.int64], ...]


def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]
) -> tuple[Generation, Generation]:
    """Two bundles whose files have the same names and sizes."""
    from var_deploy.export.bundle import ExportOptions, export_bundle

    made = []
    for seed in (1, 2):
        bundle = tmp_path_factory.mktemp("generations") / "bundle"
        model = small_model(seed, depth=1, patch_nums=(1, 2))
        manifest = export_bundle(model, bundle, ExportOptions(layout="shared"))
        with load(bundle) as pipe:
            image, tokens = pipe.generate([1], seed=3), tuple(pipe.encode(picture()))
        made.append(Generation(bundle, manifest.digest(), image, tokens))
    first, second = made
    assert first.digest != second.digest
    assert (first.image != second.image).any()
    assert any((a != b).any() for a, b in zip(first.tokens, second.tokens, strict=True))
    sizes = [{n: f.size for n, f in read_manifest(g.bundle).files.items()} for g in made]
    assert sizes[0] == sizes[1]
    return first, second


def load(bundle: Path, check: Any = "hashes") -> Pipeline:
    return Pipeline.load(bundle, "onnxruntime-cpu", threads=1, check=check)


@pytest.fixture
def bundle(two: tuple[Generation, Generation], tmp_path: Path) -> Path:
    """A copy of the first generation."""
    shutil.copytree(two[0].bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def replace(bundle: Path, by: Path) -> None:
    """As an export does it: the new folder takes the place of the old one, which is deleted."""
    new, old = bundle.with_name("new"), bundle.with_name("old")
    shutil.copytree(by, new)
    bundle.rename(old)
    new.rename(bundle)
    shutil.rmtree(old)


# Two bundles change places, in one step where the system can, until the test that started this is
# gone; with pauses that now and then leave time for a load.
SWAP = """
import ctypes, os, random, sys, time
bundle, other, how = sys.argv[1:]
parent, chance = os.getppid(), random.Random(7)
libc = ctypes.CDLL(None)
def swap(one, two):
    names = os.fsencode(one), os.fsencode(two)
    if hasattr(libc, "renameat2") and libc.renameat2(-100, names[0], -100, names[1], 2) == 0:
        return
    os.rename(one, one + ".aside")
    os.rename(two, one)
    os.rename(one + ".aside", two)
while os.getppid() == parent:
    if how == "folders":
        swap(bundle, other)
    else:
        for folder, _, names in os.walk(bundle):
            for name in names:
                one = os.path.join(folder, name)
                swap(one, os.path.join(other, os.path.relpath(one, bundle)))
    time.sleep(chance.choice((0, 0.001, 0.01, 0.1, 0.3)))
"""


@pytest.fixture
def swapping(
    two: tuple[Generation, Generation], tmp_path: Path
) -> Iterator[Callable[[str], Path]]:
    """Starts another process that swaps the two generations at one path as fast as it can."""
    children = list[subprocess.Popen[bytes]]()

    def start(how: str) -> Path:
        paths = [tmp_path / "bundle", tmp_path / "other"]
        for path, generation in zip(paths, two, strict=True):
            shutil.copytree(generation.bundle, path)
        command = [sys.executable, "-c", SWAP, *map(str, paths), how]
        children.append(subprocess.Popen(command))
        return paths[0]

    yield start
    for child in children:
        child.kill()
        child.wait()


@pytest.mark.parametrize("check", ["hashes", "sizes"])
def test_bundles_that_change_places_are_never_mixed(
    two: tuple[Generation, Generation], swapping: Callable[[str], Path], check: str
) -> None:
    """Every load is one generation, under its own digest, or says that the bundle changed."""
    bundle, known = swapping("folders"), {g.digest: g for g in two}
    seen, refused = set[str](), 0
    for _ in range(scaled(60)):
        try:
            pipe = load(bundle, check)
        except BundleError as error:
            refused += 1
            assert any(
                words in str(error)
                for words in ("changed while", "is not a bundle", "does not exist", "cannot be")
            ), error
            continue
        with pipe:
            generation = known[pipe.manifest.digest()]
            seen.add(generation.digest)
            np.testing.assert_array_equal(pipe.generate([1], seed=3), generation.image)
            try:
                tokens = pipe.encode(picture())
            except BundleChangedError as error:
                assert "was replaced since it was loaded; load it again" in str(error)
                continue
            for found, expected in zip(tokens, generation.tokens, strict=True):
                np.testing.assert_array_equal(found, expected)
    assert len(seen) == 2 or refused, "nothing changed places"


@pytest.mark.parametrize("check", ["hashes", "sizes"])
def test_a_bundle_that_was_there_for_a_moment_is_not_told_as_damage(
    two: tuple[Generation, Generation],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
) -> None:
    """Another bundle takes the place while files are checked, and the first one comes back: what
    lies there afterwards is what the manifest says, so only the folder that was read can tell."""
    away, other, moments = bundle.with_name("away"), bundle.with_name("visitor"), list[str]()
    shutil.copytree(two[1].bundle, other)
    original = BundleFiles.begin_check

    def visited(files: BundleFiles, *arguments: Any, **how: Any) -> None:
        if moments:
            return original(files, *arguments, **how)
        moments.append("once")
        bundle.rename(away)
        other.rename(bundle)
        try:
            original(files, *arguments, **how)
        finally:
            bundle.rename(other)
            away.rename(bundle)

    monkeypatch.setattr(BundleFiles, "begin_check", visited)
    with load(bundle, check) as pipe:  # the second attempt meets nobody
        assert pipe.manifest.digest() == two[0].digest
        np.testing.assert_array_equal(pipe.generate([1], seed=3), two[0].image)
    assert moments == ["once"]


def test_files_that_change_places_are_never_mixed(
    two: tuple[Generation, Generation], swapping: Callable[[str], Path]
) -> None:
    """As a tool that copies file by file does it. A mix of files is nobody's bundle: its hashes
    tell."""
    bundle, known = swapping("files"), {g.digest: g for g in two}
    for _ in range(scaled(60)):
        try:
            with load(bundle) as pipe:
                generation = known[pipe.manifest.digest()]
                np.testing.assert_array_equal(pipe.generate([1], seed=3), generation.image)
                for found, expected in zip(
                    pipe.encode(picture()), generation.tokens, strict=True
                ):
                    np.testing.assert_array_equal(found, expected)
        except BundleError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("check", ["hashes", "sizes"])
def test_a_bundle_replaced_during_a_load_is_loaded_again(
    bundle: Path,
    two: tuple[Generation, Generation],
    check: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right after its manifest was read, or after its files were checked."""
    choose = pipeline_module.choose_backend
    swaps = [two[1], two[0]]

    def swap_and_choose(*args: Any, **options: Any) -> Any:
        if swaps:
            replace(bundle, swaps.pop(0).bundle)
        return choose(*args, **options)

    monkeypatch.setattr(pipeline_module, "choose_backend", swap_and_choose)
    with pytest.raises(BundleChangedError, match="changed while it was read"):  # twice
        load(bundle, check)
    swaps.append(two[1])
    with load(bundle, check) as pipe:
        assert pipe.manifest.digest() == two[1].digest
        np.testing.assert_array_equal(pipe.generate([1], seed=3), two[1].image)


def test_a_bundle_replaced_after_its_check_is_loaded_again(
    bundle: Path, two: tuple[Generation, Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    swaps, checked = [two[1]], BundleFiles.begin_check

    def check_and_swap(files: BundleFiles, *args: Any, **how: Any) -> None:
        checked(files, *args, **how)
        if swaps:
            replace(bundle, swaps.pop().bundle)

    monkeypatch.setattr(BundleFiles, "begin_check", check_and_swap)
    with load(bundle) as pipe:
        assert pipe.manifest.digest() == two[1].digest
        np.testing.assert_array_equal(pipe.generate([1], seed=3), two[1].image)


def test_a_bundle_in_the_place_of_another_is_refused(
    bundle: Path, two: tuple[Generation, Generation]
) -> None:
    """Labels and the name in a PNG come from a manifest that was read before."""
    load(bundle).close()
    with pytest.raises(BundleChangedError, match=r"was replaced: its digest is \w{16}, expected"):
        Pipeline.load(bundle, "onnxruntime-cpu", digest=two[1].digest)
    Pipeline.load(bundle, "onnxruntime-cpu", digest=two[0].digest).close()


def test_what_was_loaded_goes_on_and_nothing_new_joins_it(
    bundle: Path, two: tuple[Generation, Generation]
) -> None:
    with load(bundle) as pipe:
        replace(bundle, two[1].bundle)
        np.testing.assert_array_equal(pipe.generate([1], seed=3), two[0].image)
        for call in (lambda: pipe.encode(picture()), lambda: pipe.decode(two[0].tokens)):
            with pytest.raises(BundleError, match=r"was replaced since it was loaded; load it"):
                call()
        np.testing.assert_array_equal(pipe.generate([1], seed=3), two[0].image)


@pytest.mark.parametrize("check", ["hashes", "sizes"])
def test_weights_that_are_overwritten_in_place(bundle: Path, check: str) -> None:
    with load(bundle, check) as pipe:
        pipe.generate([0])
        with (bundle / WEIGHTS).open("r+b") as stream:
            stream.seek(1000)
            stream.write(bytes(100))
        for _ in range(2):
            with pytest.raises(BundleChangedError, match=r"weights.bin was overwritten since"):
                pipe.generate([0])
        with pytest.raises(BundleChangedError, match=r"weights.bin was overwritten since"):
            pipe.encode(picture())


def test_an_encoder_that_is_overwritten_is_not_used(
    bundle: Path, two: tuple[Generation, Generation]
) -> None:
    with load(bundle) as pipe:
        (bundle / "fp32" / "encoder.onnx").write_bytes(b"something else")
        found = pipe.encode(picture())  # by the graph that was checked
    for tokens, expected in zip(found, two[0].tokens, strict=True):
        np.testing.assert_array_equal(tokens, expected)


def test_times_without_a_change_are_no_change(
    bundle: Path, two: tuple[Generation, Generation]
) -> None:
    """A link to a file, a copy of a bundle's times, a change of its mode."""
    with load(bundle) as pipe:
        os.link(bundle / WEIGHTS, bundle / "another name")
        np.testing.assert_array_equal(pipe.generate([1], seed=3), two[0].image)
        os.utime(bundle / WEIGHTS)
        (bundle / WEIGHTS).chmod(0o600)
        np.testing.assert_array_equal(pipe.generate([1], seed=3), two[0].image)
        assert len(pipe.encode(picture())) == 2


def test_the_check_before_a_generation_reads_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = BundleFiles(bundle, read_manifest(bundle), "fp32")
    files.check()
    read, reads = os.read, list[int]()
    monkeypatch.setattr(os, "read", lambda file, most: reads.append(most) or read(file, most))
    files.check_unchanged()
    assert not reads
    (bundle / WEIGHTS).touch()
    files.check_unchanged()
    assert reads, "its times have changed"
    files.close()


def test_descriptors_are_given_back(bundle: Path) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc here to count descriptors in")
    with load(bundle):
        pass
    before = opened()
    for _ in range(3):
        with load(bundle) as pipe:
            pipe.encode(picture())
    (bundle / WEIGHTS).write_bytes(b"")
    for _ in range(3):
        with pytest.raises(BundleError):
            load(bundle)
    assert opened() == before


def test_without_paths_to_descriptors(
    bundle: Path, two: tuple[Generation, Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on systems without /proc: opened by path, and looked at once more afterwards."""
    monkeypatch.setattr("var_deploy.bundle.files.DESCRIPTORS", str(bundle / "nowhere"))
    with load(bundle) as pipe:
        np.testing.assert_array_equal(pipe.generate([1], seed=3), two[0].image)
        for tokens, expected in zip(pipe.encode(picture()), two[0].tokens, strict=True):
            np.testing.assert_array_equal(tokens, expected)
    confirmed, one_at_a_time = BundleFiles.confirm, threading.Lock()

    def swap_and_confirm(files: BundleFiles, name: str) -> None:
        with one_at_a_time:  # graphs are opened side by side
            replace(bundle, two[1].bundle)
        confirmed(files, name)

    monkeypatch.setattr(BundleFiles, "confirm", swap_and_confirm)
    with pytest.raises(BundleChangedError, match="changed while it was read"):
        load(bundle)
