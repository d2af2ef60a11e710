"""A bundle reaches every node whole, and once."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_steps import tree
from var_deploy.config import RuntimeConfig
from var_deploy.errors import BundleError, VarDeployError
from var_deploy.pipeline import Pipeline

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

from var_deploy.cluster import place  # noqa: E402
from var_deploy.cluster.connect import connected  # noqa: E402
from var_deploy.cluster.place import BundleSource, FolderSource, bundle_source  # noqa: E402


@pytest.fixture(scope="module")
def joined(started: Any) -> Iterator[None]:
    with connected(started.address):
        yield


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, joined: None) -> list[Path]:
    """This process is a node with an empty cache on which no bundle lies at its own path; the
    copies that it fetches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(place, "PART", 100_000)  # of the files that a driver hands over
    fetched: list[Path] = []
    holds, fetch = FolderSource._holds, FolderSource._fetch

    def not_here(self: FolderSource, folder: Path, *, hashes: bool) -> bool:
        return folder != self.bundle and holds(self, folder, hashes=hashes)

    def watched(self: FolderSource, copy: Path) -> None:
        fetch(self, copy)
        fetched.append(copy)

    monkeypatch.setattr(FolderSource, "_holds", not_here)
    monkeypatch.setattr(FolderSource, "_fetch", watched)
    return fetched


def test_a_bundle_that_is_there_is_used(
    bundle: Path, joined: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    source = bundle_source(Path("bundle"))
    assert source.path() == bundle
    path = ray.remote(num_cpus=0)(BundleSource.path)  # for another process
    assert ray.get(path.remote(source)) == bundle


def test_once_a_node(bundle: Path, elsewhere: list[Path]) -> None:
    (bundle / "engines").mkdir()
    (bundle / "engines" / "engine.json").touch()
    source, found = bundle_source(bundle), []
    threads = [threading.Thread(target=lambda: found.append(source.path())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert elsewhere == found[:1] and len(set(found)) == 1
    expected = {name: data for name, data in tree(bundle).items() if "engine" not in name}
    assert tree(found[0]) == expected
    assert {path.suffix for path in found[0].parent.iterdir()} == {"", ".lock"}


def test_the_files_of_one_precision(bundle: Path, elsewhere: list[Path]) -> None:
    shutil.copytree(bundle / "fp32", bundle / "fp16")
    found = bundle_source(bundle, "fp32").path()
    assert {path.name for path in found.iterdir()} == {"fp32", "manifest.json"}
    assert found.name.endswith("-fp32")


def test_a_text_encoder_comes_along(text_bundle: Path, elsewhere: list[Path]) -> None:
    source, place = bundle_source(text_bundle, "fp32"), text_bundle.parent / "t5"
    with source.open(RuntimeConfig(threads=1), 1) as pipe:
        image = pipe.generate(prompts="a red fox")
    with Pipeline.load(text_bundle, threads=1) as pipe:
        assert (pipe.generate(prompts="a red fox") == image).all()
    bundle, encoder = elsewhere
    assert tree(bundle) == tree(text_bundle) and tree(encoder) == tree(place)
    (encoder / "tokenizer.json").unlink()
    assert source.text_encoder is not None
    assert source.text_encoder.path() == encoder == elsewhere[2]
    assert tree(encoder) == tree(place)


def test_a_text_encoder_of_another_precision(text_bundle: Path, joined: None) -> None:
    """It is offered with all that it has, since the worker decides."""
    with pytest.raises(BundleError, match="has no fp16 graphs"):
        bundle_source(text_bundle, "fp16").open(RuntimeConfig(precision="fp16"), 1)
    config = RuntimeConfig(precision="int8")
    source = bundle_source(text_bundle, "fp32", text_config=config).text_encoder
    assert source is not None and source.precision == "auto"


def test_a_damaged_copy_is_fetched_again(bundle: Path, elsewhere: list[Path]) -> None:
    source = bundle_source(bundle)
    weights = source.path() / "fp32" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    assert source.path() == elsewhere[0] == elsewhere[1]
    assert weights.read_bytes() == (bundle / "fp32" / "weights.bin").read_bytes()


def damage(bundle: Path) -> None:
    weights = bundle / "fp32" / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))


def remove(bundle: Path) -> None:
    (bundle / "fp32" / "weights.bin").unlink()


@pytest.mark.parametrize(
    ("change", "words"), [(damage, "does not match its hash"), (remove, "cannot be read: No such")]
)
def test_what_arrives_damaged_is_refused(
    bundle: Path, elsewhere: list[Path], change: Callable[[Path], None], words: str
) -> None:
    source = bundle_source(bundle)
    change(bundle)
    with pytest.raises(BundleError, match=words) as caught:
        source.path()
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in place.cache_folder().iterdir()] == [".lock"]


def test_a_driver_outside_of_the_cluster_hands_over_the_files(
    bundle: Path, elsewhere: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place.client, "is_connected", lambda: True)
    source, expected = bundle_source(bundle), tree(bundle)
    shutil.rmtree(bundle)
    assert tree(source.path()) == expected


def test_an_incomplete_bundle_is_not_offered(bundle: Path, joined: None) -> None:
    remove(bundle)
    with pytest.raises(BundleError, match=r"weights\.bin is missing"):
        bundle_source(bundle)


def test_another_version(bundle: Path, joined: None) -> None:
    other = dataclasses.replace(bundle_source(bundle), version="0.0")
    with pytest.raises(VarDeployError, match=r"has var-deploy .*, expected 0\.0: install the same"):
        other.path()


def test_a_cache_that_cannot_be_written(
    bundle: Path, elsewhere: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.parent / "file"))
    with pytest.raises(VarDeployError, match="cannot be written: Not a directory; make room"):
        bundle_source(bundle).path()
