"""`demo`: the bundles that come with var-deploy, and pictures, made without PyTorch."""

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

from cli_steps import done, pixels, refused, run, tree
from var_deploy import demo as demo_module
from var_deploy.demo import (
    POCKET,
    POCKET_TEXT,
    POCKET_TEXT_ENCODER,
    PackedBundle,
    write_demo_bundle,
)
from var_deploy.errors import UsageError, VarDeployError
from var_deploy.export.pack_demo import pack_demo
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest
from var_deploy.text.examples import examples

PACKED = (POCKET, POCKET_TEXT, POCKET_TEXT_ENCODER)
REMEDY = "an export has changed: run `make bundle` and commit the archives in export/"
EACH_BUNDLE = pytest.mark.parametrize("packed", PACKED, ids=[packed.name for packed in PACKED])
SENTENCE = "a purple fish under a full moon"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after `var-deploy demo`."""
    folder = tmp_path_factory.mktemp("demo") / "build"
    done("demo", "--out", folder, "--quiet")
    return folder


@pytest.fixture(scope="module")
def exported(pocket_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same bundles as `export` writes them."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(pocket_bundle, folder / POCKET.name)
    done("export", "pocket-text", "--out", folder / POCKET_TEXT.name, "--quiet")
    return folder


@EACH_BUNDLE
def test_the_bundle_is_that_of_an_export(
    built: Path, exported: Path, packed: PackedBundle
) -> None:
    found, expected = tree(built / packed.name), tree(exported / packed.name)
    assert found.keys() == expected.keys()
    same = [name for name in found if name != "manifest.json" and found[name] != expected[name]]
    assert same == [], REMEDY
    manifests: list[Any] = [packed.manifest(each / packed.name) for each in (built, exported)]
    # versions of what wrote it differ from one machine to the next
    without = [dataclasses.replace(manifest, tools={}) for manifest in manifests]
    assert without[0] == without[1], REMEDY


@EACH_BUNDLE
def test_the_archive_is_made_of_an_export(
    built: Path, tmp_path: Path, packed: PackedBundle
) -> None:
    pack_demo(packed, built / packed.name, tmp_path / "again.zip")
    kept_archive = files(packed.package) / packed.archive
    assert (tmp_path / "again.zip").stat().st_size < 1_000_000, "most of it is in the weights"
    again, kept = tmp_path / "again", tmp_path / "kept"
    shutil.unpack_archive(tmp_path / "again.zip", again)
    shutil.unpack_archive(str(kept_archive), kept)
    assert tree(again) == tree(kept), REMEDY


def test_the_picture_is_what_generate_makes(
    built: Path, pocket_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "same.png"
    options = ("--count", 40, "--seed", 1, "--threads", 1, "--quiet")
    done("generate", pocket_bundle, *options, "--out", out)
    np.testing.assert_array_equal(pixels(built / "demo.png"), pixels(out))
    assert read_settings(built / "demo.png") == read_settings(out)


def test_the_other_picture_is_of_sentences(built: Path) -> None:
    sentences = examples("pocket-text")
    assert json.loads(read_settings(built / "demo-text.png")["prompt"]) == [*sentences] * 4
    height, width, _ = pixels(built / "demo-text.png").shape
    assert (height // 64, width // 64) == (4, len(sentences))


def test_a_sentence_alone(tmp_path: Path) -> None:
    lines = run("demo", "--out", tmp_path, "--prompt", f"{SENTENCE} and a zeppelin")
    assert lines.exit_code == 0 and "pocket-text does not know: zeppelin" in lines.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"pocket-text", "pocket-text-text", "demo-text.png"}
    told = json.loads(done("demo", "--out", tmp_path, "--prompt", SENTENCE, "--json").stdout)
    assert told["text"]["prompts"] == [SENTENCE] and "picture" not in told
    assert read_settings(tmp_path / "demo-text.png")["prompt"] == SENTENCE


def test_without_tokenizers_there_are_no_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tokenizers" else found(name)
    )
    refused(2, "demo", "--out", tmp_path, "--prompt", SENTENCE, parts=("pip install", "tokeniz"))
    assert not list(tmp_path.iterdir())
    lines = run("demo", "--out", tmp_path)
    assert lines.exit_code == 0
    assert "no pictures of sentences: they need tokenizers; run" in lines.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"pocket", "demo.png"}
    assert json.loads(done("demo", "--out", tmp_path, "--json").stdout)["text"] is None


def test_what_is_there_is_used(built: Path) -> None:
    before = tree(built)
    told = json.loads(done("demo", "--out", built, "--json").stdout)
    assert (told["bundle"], told["picture"]) == (str(built / "pocket"), str(built / "demo.png"))
    assert told["digest"] == read_manifest(built / "pocket").digest()
    assert told["text"]["digest"] == read_manifest(built / "pocket-text").digest()
    assert tree(built) == before


def test_what_is_of_others_is_left_alone(tmp_path: Path, bundle: Path) -> None:
    bundle.rename(tmp_path / "pocket")
    refused(2, "demo", "--out", tmp_path, parts=("bundle of another model than pocket",))
    (tmp_path / "other" / "pocket").mkdir(parents=True)
    (tmp_path / "other" / "pocket" / "notes.txt").touch()
    refused(2, "demo", "--out", tmp_path / "other", parts=("notes.txt",))


@pytest.mark.parametrize("present", [True, False])
def test_it_says_how_to_go_on(built: Path, monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: present or name == "tokenizers" or None
    )
    lines = done("demo", "--out", built).stdout.splitlines()
    following = lines[lines.index("next:") + 1 :]
    assert any(f"var-deploy serve {built / 'pocket'}" in line for line in following)
    assert any(f"var-deploy generate {built / 'pocket'}" in line for line in following)
    installs = any("pip install" in line and "fastapi" in line for line in following)
    assert installs == (not present)


class Installed:
    """A package's folder with one file that is missing (None) or other."""

    def __init__(self, packed: PackedBundle, name: str, content: bytes | None) -> None:
        self.folder = files(packed.package)
        self.name, self.content = name, content

    def __truediv__(self, name: str) -> Any:
        found = self.folder / name
        return self if name == self.name else found

    def read_bytes(self) -> bytes:
        if self.content is None:
            raise FileNotFoundError(self.name)
        return self.content


@EACH_BUNDLE
def test_a_broken_installation_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: PackedBundle
) -> None:
    name = packed.sources[0]
    monkeypatch.setattr(demo_module, "files", lambda package: Installed(packed, name, None))
    with pytest.raises(VarDeployError, match=f"{packed.name}'s {name} is not in this"):
        write_demo_bundle(packed, tmp_path / packed.name)
    monkeypatch.undo()
    weights = bytearray((files(packed.package) / name).read_bytes())
    weights[-1] ^= 1
    broken = Installed(packed, name, bytes(weights))
    monkeypatch.setattr(demo_module, "files", lambda package: broken)
    with pytest.raises(VarDeployError, match="is damaged in this installation"):
        write_demo_bundle(packed, tmp_path / packed.name)
    assert not (tmp_path / packed.name).exists()


def test_nothing_of_the_build_machine_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from var_deploy import demo\n"
        "for packed in (demo.POCKET, demo.POCKET_TEXT, demo.POCKET_TEXT_ENCODER):\n"
        "    demo.write_demo_bundle(packed, Path(sys.argv[1], packed.name))\n"
        "print({'torch', 'onnx', 'safetensors'} & set(sys.modules))"
    )
    command = (sys.executable, "-c", code, str(tmp_path))
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "set()\n", "")


def test_a_folder_that_holds_anything_is_refused(tmp_path: Path) -> None:
    write_demo_bundle(POCKET, tmp_path / "pocket")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="already holds a bundle"):
        write_demo_bundle(POCKET, tmp_path / "pocket")
    assert tree(tmp_path) == before
