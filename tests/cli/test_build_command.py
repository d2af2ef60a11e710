"""`build` on the command line, with a stand-in for TensorRT."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

import fake_tensorrt
from cli_steps import assert_one_line, done, edit, export, refused, run
from fake_machine import H100_GPU, FakeMachine
from fake_tensorrt import builder as fake
from var_deploy.errors import BackendError
from var_deploy.host.machine import Driver
from var_deploy.manifest import read_manifest
from var_deploy.runtime.tensorrt import build as build_module

NAME = "tensorrt-10.3.0-sm87-fp16"


@pytest.fixture(scope="module")
def exported(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "bundle"
    result = export(files, out, "--precision", "fp16")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Orin with TensorRT 10.3, as far as the command can see."""
    cuda = types.ModuleType("var_deploy.runtime.backends.cuda")
    cuda.device_name_and_sm = lambda: ("Orin", 87)
    cuda.Cuda = lambda: types.SimpleNamespace(free_memory=lambda: (1, 1), close=lambda: None)
    monkeypatch.setitem(sys.modules, "var_deploy.runtime.backends.cuda", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.rtx_module())


def test_what_was_built_is_a_table(bundle: Path) -> None:
    lines = done("build", bundle).stdout.splitlines()
    assert lines[0].split() == ["engine", "profiles", "size", "build", "time"]
    rows = {line.split()[0]: line.split()[1:3] for line in lines[2:7]}
    assert rows == {
        "condition": ["built", "1"],
        "step": ["built", "3"],
        "decoder": ["built", "1"],
        "encoder": ["built", "1"],
        "accumulate": ["built", "1"],
    }
    assert re.fullmatch(rf"{bundle}/engines/{NAME}: 5 built, 0 kept, [\d.]+ kB", lines[8])
    assert lines[9].startswith(
        "for tensorrt 10.3.0 on Orin (sm87), fp16; layout shared (neither fits: "
    )
    assert lines[10].startswith("note: tensorrt 10.3.0: an accuracy bug")
    assert ": 0 built, 5 kept, " in done("build", bundle).stdout
    assert ": 5 built, 0 kept, " in done("build", bundle, "--force").stdout


def test_the_report_as_json(bundle: Path) -> None:
    options = ("--layout", "per-scale", "--no-encoder", "--workspace", 64)
    report = json.loads(done("build", bundle, "--json", *options).stdout)
    assert report["folder"] == str(bundle / "engines" / NAME)
    assert report["target"] == {
        "library": "tensorrt",
        "version": "10.3.0",
        "device": "Orin",
        "sm": 87,
        "precision": "fp16",
    }
    assert (report["layout"], report["reason"], report["notes"]) == ("per-scale", "as asked", [])
    names = ["condition", "scale_00", "scale_01", "scale_02", "decoder"]
    assert [e["graph"] for e in report["engines"]] == names
    assert not any(e["kept"] for e in report["engines"])
    assert fake.CONFIGS[-1].get_memory_pool_limit(fake.MemoryPoolType.WORKSPACE) == 64 << 20


def test_a_relative_path_works_in_a_process_of_its_own(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    result = done("build", bundle.name, "--low-memory", "--no-encoder", "--optimization-level", 0)
    assert ": 3 built, 0 kept, " in result.stdout


@pytest.mark.parametrize("library", ["tensorrt", "var_deploy.runtime.backends.cuda"])
def test_a_missing_driver_is_named_first(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """Whichever library is missing besides."""
    monkeypatch.setattr(build_module, "Machine", FakeMachine)
    if library == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    else:

        def fail() -> None:
            raise BackendError("cudaGetDeviceProperties failed: cudaErrorInsufficientDriver")

        monkeypatch.setattr(sys.modules[library], "device_name_and_sm", fail)
    parts = ("no CUDA driver is installed; install NVIDIA's", "doctor", "--compute-capability")
    refused(1, "build", bundle, parts=parts)
    here = FakeMachine(cuda=Driver(cuda="12.8", gpus=(H100_GPU,)))
    monkeypatch.setattr(build_module, "Machine", lambda: here)
    own = "neither tensorrt nor" if library == "tensorrt" else "cudaErrorInsufficientDriver"
    assert own in refused(1, "build", bundle)


@pytest.mark.parametrize("typed", ["5.9", "7.4", "74", "8", "8.65", "sm86", "8,6", "", "1000"])
def test_what_is_no_compute_capability(bundle: Path, typed: str) -> None:
    parts = ("at least 7.5, such as 8.6 or 86", repr(typed))
    refused(2, "build", bundle, "--compute-capability", typed, parts=parts)


@pytest.mark.parametrize("typed", ["86", "8.6"])
def test_engines_for_another_machine(bundle: Path, typed: str) -> None:
    result = done("build", bundle, "--compute-capability", typed)
    assert "for tensorrt_rtx 1.7.0 on any GPU (sm86), fp16" in result.stdout
    assert "note:" not in result.stdout
    refused(
        2,
        *("build", bundle, "--library", "tensorrt", "--compute-capability", 86),
        parts=("tensorrt_rtx alone",),
    )
    refused(1, "build", bundle, "--compute-capability", 90, parts=("75, 86, 89, 120",))


def test_ctrl_c_ends_with_130_and_the_next_call_goes_on(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake.PLANT, "decoder=interrupt")
    result = run("build", bundle)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    monkeypatch.delenv(fake.PLANT)
    assert ": 3 built, 2 kept, " in done("build", bundle).stdout


def test_failures_are_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake.PLANT, "decoder=fail")
    refused(1, "build", bundle, parts=("could not build decoder", "ForeignNode"))
    monkeypatch.delenv(fake.PLANT)
    refused(1, "build", bundle, "--precision", "fp32", parts=("no fp32 graphs",))
    refused(1, "build", bundle / "nowhere", parts=("does not exist",))
    edit(bundle, lambda data: data["files"]["fp16/weights.bin"].update(sha256="0" * 64))
    refused(1, "build", bundle, parts=("weights.bin does not match its hash",))


def test_int8_is_not_for_engines(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        *(2, "build", bundle, "--precision", "int8"),
        parts=("int8 is for onnxruntime-cpu, not for TensorRT",),
    )

    manifest = read_manifest(bundle)
    alone = dataclasses.replace(manifest, graphs={"int8": manifest.graphs["fp16"]})
    for module in ("build", "job"):
        name = f"var_deploy.runtime.tensorrt.{module}.read_manifest"
        monkeypatch.setattr(name, lambda bundle: alone)
    refused(1, "build", bundle, parts=("has only int8 graphs", "--precision fp16"))
    assert not (bundle / "engines").exists()


def test_without_tensorrt_it_says_what_to_install(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = FakeMachine(cuda=Driver(cuda="12.8", gpus=(H100_GPU,)))
    monkeypatch.setattr(build_module, "Machine", lambda: here)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    words = ("JetPack", 'pip install "tensorrt>=')
    refused(1, "build", bundle, "--library", "tensorrt", parts=words)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    refused(1, "build", bundle, parts=("neither tensorrt nor tensorrt_rtx is installed",))
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("--optimization-level", 6),
        ("--workspace", 0),
        ("--layout", "fast"),
        ("--library", "openvino"),
        ("--compute-capability", 8),
    ],
)
def test_bad_usage_ends_with_2(bundle: Path, wrong: tuple[object, ...]) -> None:
    assert_one_line(run("build", bundle, *wrong), 2, str(wrong[0]))


def test_the_help_shows_an_example() -> None:
    text = done("build", "--help").stdout
    assert "var-deploy build build/d16 --low-memory" in text
    assert "--compute-capability" in text
