"""`demo`: pocket's bundle and a picture, made without PyTorch from what the package holds."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_steps import done, pixels, refused, tree
from var_deploy import demo as demo_module
from var_deploy.demo import write_demo_bundle
from var_deploy.errors import UsageError
from var_deploy.export.pocket.pack_demo import pack_demo
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest

REMEDY = "an export of pocket has changed: run `make bundle` and commit export/pocket/bundle.zip"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after `var-deploy demo`."""
    folder = tmp_path_factory.mktemp("demo") / "build"
    done("demo", "--out", folder, "--quiet")
    return folder


def test_the_bundle_is_that_of_an_export(built: Path, pocket_bundle: Path) -> None:
    found, expected = tree(built / "pocket"), tree(pocket_bundle)
    assert found.keys() == expected.keys()
    same = [name for name in found if name != "manifest.json" and found[name] != expected[name]]
    assert same == [], REMEDY
    manifests = [read_manifest(built / "pocket"), read_manifest(pocket_bundle)]
    # versions of what wrote it differ from one machine to the next
    without = [dataclasses.replace(manifest, tools={}) for manifest in manifests]
    assert without[0] == without[1], REMEDY


def test_the_archive_is_made_of_an_export(built: Path, tmp_path: Path) -> None:
    pack_demo(built / "pocket", tmp_path / "again.zip")
    packed = files(demo_module.PACKAGE) / demo_module.ARCHIVE
    assert (tmp_path / "again.zip").stat().st_size < 700_000, "most of it comes from the weights"
    again, kept = tmp_path / "again", tmp_path / "kept"
    shutil.unpack_archive(tmp_path / "again.zip", again)
    shutil.unpack_archive(str(packed), kept)
    assert tree(again) == tree(kept), REMEDY


def test_the_picture_is_what_generate_makes(
    built: Path, pocket_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "same.png"
    options = ("--count", 40, "--seed", 1, "--threads", 1, "--quiet")
    done("generate", pocket_bundle, *options, "--out", out)
    np.testing.assert_array_equal(pixels(built / "demo.png"), pixels(out))
    assert read_settings(built / "demo.png") == read_settings(out)


def test_what_is_there_is_used(built: Path) -> None:
    before = tree(built)
    told = json.loads(done("demo", "--out", built, "--json").stdout)
    assert (told["bundle"], told["picture"]) == (str(built / "pocket"), str(built / "demo.png"))
    assert told["digest"] == read_manifest(built / "pocket").digest()
    assert tree(built) == before


def test_what_is_of_others_is_left_alone(tmp_path: Path, bundle: Path) -> None:
    bundle.rename(tmp_path / "pocket")
    refused(2, "demo", "--out", tmp_path, parts=("bundle of another model than pocket",))
    (tmp_path / "other" / "pocket").mkdir(parents=True)
    (tmp_path / "other" / "pocket" / "notes.txt").touch()
    refused(2, "demo", "--out", tmp_path / "other", parts=("notes.txt",))


@pytest.mark.parametrize("present", [True, False])
def test_it_says_how_to_go_on(built: Path, monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: present or None)
    lines = done("demo", "--out", built).stdout.splitlines()
    following = lines[lines.index("next:") + 1 :]
    assert any(f"var-deploy serve {built / 'pocket'}" in line for line in following)
    assert any(f"var-deploy generate {built / 'pocket'}" in line for line in following)
    installs = any("pip install" in line and "fastapi" in line for line in following)
    assert installs == (not present)


class Installed:
    """The package's folder with one file that is missing (None) or other."""

    def __init__(self, name: str, content: bytes | None) -> None:
        self.folder = files(demo_module.PACKAGE)
        self.name, self.content = name, content

    def __truediv__(self, name: str) -> Any:
        found = self.folder / name
        return self if name == self.name else found

    def read_bytes(self) -> bytes:
        if self.content is None:
            raise FileNotFoundError(self.name)
        return self.content


def test_a_broken_installation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = demo_module.SOURCES[0]
    monkeypatch.setattr(demo_module, "files", lambda package: Installed(name, None))
    refused(1, "demo", "--out", tmp_path / "a", parts=(name, "install var-deploy again"))
    monkeypatch.undo()
    weights = bytearray((files(demo_module.PACKAGE) / name).read_bytes())
    weights[-1] ^= 1
    broken = Installed(name, bytes(weights))
    monkeypatch.setattr(demo_module, "files", lambda package: broken)
    refused(1, "demo", "--out", tmp_path / "a", parts=("is damaged in this installation",))
    assert not (tmp_path / "a" / "pocket").exists()


def test_nothing_of_the_build_machine_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from var_deploy.demo import write_demo_bundle\n"
        "write_demo_bundle(Path(sys.argv[1]))\n"
        "print({'torch', 'onnx', 'safetensors'} & set(sys.modules))"
    )
    command = (sys.executable, "-c", code, str(tmp_path / "pocket"))
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "set()\n", "")


def test_a_folder_that_holds_anything_is_refused(tmp_path: Path) -> None:
    write_demo_bundle(tmp_path / "pocket")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="already holds a bundle"):
        write_demo_bundle(tmp_path / "pocket")
    assert tree(tmp_path) == before
