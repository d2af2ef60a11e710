"""`export` and `verify` on the command line, with fakes for the export half."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cli_steps import assert_one_line, run
from var_deploy.errors import ExportError
from var_deploy.export.checkpoint.hints import Hints
from var_deploy.manifest import FileInfo


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The export half, noting what it is asked for."""
    calls: list[dict[str, Any]] = []

    def load_model(preset: str | None, **options: Any) -> str:
        calls.append({"preset": preset, **options})
        options["progress"]("reading")
        return "model"

    def export_bundle(model: str, out: Path, options: Any, progress: Any, *, replace: bool) -> Any:
        calls.append({"model": model, "out": out, "replace": replace, **vars(options)})
        progress("writing", 0.5)
        if options.batch == 99:
            raise ExportError("disk full")
        files = {"a": FileInfo(size=2_500_000, sha256="")}
        return SimpleNamespace(files=files, digest=lambda: "abc")

    def calibrate(out: Path, images: int, progress: Any) -> str:
        calls.append({"calibrated": out, "images": images})
        return "blocks.0.ffn comes near overflow" if images > 1 else ""

    checkpoint, bundle = ModuleType("checkpoint"), ModuleType("bundle")
    calibration = ModuleType("calibrate")
    calibration.calibrate = calibrate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "var_deploy.export.debug.fp16_overflow", calibration)
    checkpoint.load_model = load_model  # type: ignore[attr-defined]
    bundle.export_bundle = export_bundle  # type: ignore[attr-defined]
    bundle.ExportOptions = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "var_deploy.export.checkpoint.assemble", checkpoint)
    monkeypatch.setitem(sys.modules, "var_deploy.export.bundle", bundle)
    return calls


def test_export_tells_programs_and_is_quiet(tmp_path: Path, exporter: list[dict[str, Any]]) -> None:
    given = ("export", "pocket", "--out", tmp_path / "b")
    told = json.loads(run(*given, "--json").stdout)
    assert told == {
        "out": str(tmp_path / "b"), "digest": "abc", "bytes": 2_500_000, "warning": ""
    }
    result = run(*given, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert len(exporter) == 4


def test_export_passes_on_its_options(tmp_path: Path, exporter: list[dict[str, Any]]) -> None:
    result = run(
        *("export", "var-d16", "--out", tmp_path / "b", "--random-weights", 0, "--batch", 2),
        *("--precision", "fp16,fp32", "--precision", "fp16"),
        *("--precision", "int8", "--no-guidance", "--layout", "shared", "--calibration", 2),
    )
    assert result.exit_code == 0, result.output
    assert "1 files, 2.5 MB" in result.stdout
    assert result.stderr == "warning: blocks.0.ffn comes near overflow\n"
    load, write, calibrated = exporter
    assert calibrated == {"calibrated": tmp_path / "b", "images": 2}
    del load["progress"]
    assert load == {
        "preset": "var-d16",
        "checkpoint": None,
        "tokenizer": None,
        "random_weights": 0,
        "hints": Hints(),
    }
    assert write == {
        "model": "model",
        "out": tmp_path / "b",
        "precisions": ("fp16", "fp32", "int8"),
        "batch": 2,
        "guidance": False,
        "more_smooth": False,
        "layout": "shared",
        "calibration": 2,
        "replace": False,
    }


def test_images_to_calibrate_with(tmp_path: Path, exporter: list[dict[str, Any]]) -> None:
    """Four for the ranges of int8, one to look for overflow in fp16, which 0 leaves out."""
    out, both = tmp_path / "b", ("--precision", "int8", "--precision", "fp16")
    assert run("export", "pocket", "--out", out, *both).exit_code == 0
    _, write, calibrated = exporter
    assert (write["calibration"], calibrated["images"]) == (8, 1)
    exporter.clear()
    none = ("--calibration", 0)
    assert run("export", "pocket", "--out", out, "--precision", "fp16", *none).exit_code == 0
    assert len(exporter) == 2 and exporter[1]["calibration"] >= 1, "never read, and still valid"
    exporter.clear()
    result = run("export", "pocket", "--out", out, "--precision", "int8", *none)
    assert_one_line(result, 2, "--calibration", "at least 1 with int8")
    assert_one_line(run("export", "pocket", "--out", out, "--calibration", -1), 2, "--calibration")
    assert not exporter


def test_the_same_default_as_the_library() -> None:
    pytest.importorskip("torch")
    from var_deploy.cli.export import INT8_IMAGES
    from var_deploy.export.bundle import ExportOptions

    assert ExportOptions().calibration == INT8_IMAGES


def test_export_replaces_only_bundles_and_only_on_request(
    bundle: Path, exporter: list[dict[str, Any]]
) -> None:
    assert_one_line(run("export", "pocket", "--out", bundle), 2, "--force")
    other = bundle.parent / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    assert_one_line(run("export", "pocket", "--out", other, "--force"), 2, "holds no bundle")
    assert_one_line(run("export", "pocket", "--out", other / "thesis.tex"), 2, "is a file")
    assert not exporter
    assert run("export", "pocket", "--out", bundle, "--force").exit_code == 0
    assert run("export", "pocket", "--out", bundle.parent / "new").exit_code == 0


def test_export_failures(tmp_path: Path, exporter: list[dict[str, Any]]) -> None:
    out = tmp_path / "b"
    assert_one_line(run("export", "pokcet", "--out", out), 2, "pocket")
    assert_one_line(run("export", "pocket", "--out", "/proc/self/b"), 2, "/proc/self")
    assert not exporter
    assert_one_line(run("export", "pocket", "--out", out, "--batch", 99), 1, "disk full")


@pytest.mark.parametrize(("command", "module"), [("export", "bundle"), ("verify", "verify.bundle")])
def test_without_torch_it_says_what_to_install(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: str
) -> None:
    class NoTorch:
        def find_spec(self, name: str, *_: object) -> None:
            if name in (f"var_deploy.export.{module}", "torch"):
                raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.delitem(sys.modules, f"var_deploy.export.{module}", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoTorch(), *sys.meta_path])
    arguments = ["pocket", "--out", bundle.parent / "b"] if command == "export" else [bundle]
    result = run(command, *arguments)
    assert_one_line(result, 1, "torch", 'pip install "torch>=')


class FakeReport:
    def __init__(self, failure: str | None) -> None:
        self.failure, self.passed, self.unstored = failure, failure is None, ""

    def rows(self) -> list[tuple[str, ...]]:
        return [("scale", "tensor", "abs", "error", "bound", "logits", "top-1"), ("0",) * 7]

    def remarks(self) -> list[str]:
        return ["", "said"]

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed}


@pytest.mark.parametrize("failure", [None, "scale_01: new_f_hat differs by 0.3"])
def test_verify(bundle: Path, monkeypatch: pytest.MonkeyPatch, failure: str | None) -> None:
    calls: list[dict[str, Any]] = []

    def verify_bundle(folder: Path, **options: Any) -> FakeReport:
        calls.append({"folder": folder, **options})
        options["progress"]("scale_00", 0.1)
        return FakeReport(failure)

    module = ModuleType("verify")
    module.verify_bundle = verify_bundle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "var_deploy.export.verify.bundle", module)
    result = run("verify", bundle, "--precision", "fp32")
    assert result.stdout.startswith("scale  tensor  abs  error")
    assert result.stdout.endswith("\n\nsaid\n")
    assert calls[0]["folder"] == bundle
    assert calls[0]["precision"] == "fp32"
    as_json = run("verify", bundle, "--json")
    assert json.loads(as_json.stdout) == {"passed": failure is None, "unstored": ""}
    if failure:
        assert_one_line(result, 1, failure)
        assert json.loads(as_json.stderr) == {"error": failure, "exit_code": 1}
    else:
        assert result.exit_code == as_json.exit_code == 0
