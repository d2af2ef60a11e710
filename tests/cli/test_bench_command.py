"""`var-deploy bench` from end to end, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli_steps import done, refused, run
from var_deploy.bench import run as module
from var_deploy.bench.rounds import Comparison
from var_deploy.host.machine import Machine

LAUNCHES = ["condition", "scale_00", "scale_01", "scale_02", "decoder"]
QUICK = ("--repeat", 2, "--warm-up", 0, "--threads", 1)


def test_a_bundle_is_timed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Machine, "has_module", lambda self, name: False)
    report, figure = tmp_path / "new" / "report.json", tmp_path / "figure.png"
    options = ("--batch", "3", "--precision", "fp32", "--against", "openvino", "--busy", "1")
    text = done("bench", made, *QUICK, *options, "--json", report, "--plot", figure).stdout
    data = json.loads(report.read_text())
    (found,) = data["runs"]
    assert found["images"] == 3
    assert found["rates"]["threads"] == 1
    assert min(found["rates"]["probes"].values()) > 1e8
    ours, openvino = found["contenders"]
    assert (ours["name"], ours["problem"]) == ("var-deploy fp32", "")
    assert ours["runs_on"]["threads"] == "1"
    assert ours["runs_on"]["images a launch"] == "2"
    assert ours["generation"]["count"] == 2
    assert list(ours["launches"]) == LAUNCHES
    parts = sum(launch["median_ms"] for launch in ours["launches"].values())
    assert 0 < parts < 1.5 * ours["generation"]["median_ms"]
    assert 0 < ours["host_share"] < 1
    assert 1e3 * ours["cold_s"] > ours["generation"]["median_ms"], "it holds an image"
    parts = ours["cold_parts_s"]
    assert list(parts) == ["imports", "checking", "opening", "first image"]
    assert sum(parts.values()) == pytest.approx(ours["cold_s"], abs=0.001)
    assert data["settings"]["busy"] == 1
    assert ours["memory"]["peak_over_weights"] > 1
    assert 0 < ours["floor"]["reached"] < 1
    assert [row["launch"] for row in ours["floor"]["launches"]] == LAUNCHES
    assert "pip install" in openvino["problem"]
    assert data["settings"]["repeat"] == 2
    assert data["machine"]["cpu"] and data["date"]
    assert str(made) not in report.read_text(), "what is read by others names no folders"
    assert "1 process of other work beside everything" in text
    assert "3 images a generation" in text and "openvino: not run" in text
    with Image.open(figure) as image:
        assert image.size[0] > 1000


@pytest.fixture
def no_rounds(monkeypatch: pytest.MonkeyPatch) -> list[Comparison]:
    """Nothing is started; what would have been."""
    asked: list[Comparison] = []

    def fail(self: Comparison) -> None:
        asked.append(self)
        self.results[0].problem = "killed"

    monkeypatch.setattr(Comparison, "run", fail)
    return asked


def test_our_own_failure_is_one(made: Path, no_rounds: list[Comparison]) -> None:
    result = run("bench", made, "--batch", "1,4", "--against", "torch")
    assert result.exit_code == 1
    assert result.stderr == "error: var-deploy did not run: killed\n"
    assert "var-deploy: not run: killed" in result.stdout, "the report is there all the same"
    assert "4 images a generation" in result.stdout
    assert len(no_rounds) == 2


def test_json_alone_on_stdout(made: Path, no_rounds: list[Comparison]) -> None:
    result = run("bench", made, "--json", "-")
    data: Any = json.loads(result.stdout)
    assert data["runs"][0]["contenders"][0]["problem"] == "killed"


def test_ctrl_c(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Comparison) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupt)
    result = run("bench", made)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--precision", "fp64"), ("--precision takes auto, fp32", "'fp64'")),
        (("--precision", "fp32,"), ("found ''",)),
        (("--backend", "cpu"), ("--backend takes auto", "onnxruntime-cpu")),
        (("--against", "torch,jax"), ("--against takes torch", "openvino-bf16", "'jax'")),
        (("--batch", "1,0"), ("--batch takes numbers from 1",)),
        (("--batch", "two"), ("--batch takes numbers from 1", "'two'")),
        (("--repeat", 0), ("--repeat",)),
        (("--threads", 0), ("--threads",)),
        (("--plot", "figure.pdf"), ("written as .png",)),
    ],
)
def test_bad_usage(
    made: Path, no_rounds: list[Comparison], options: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    refused(2, "bench", made, *options, parts=parts)
    assert not no_rounds


def test_what_cannot_be_done_is_known_first(
    made: Path, tmp_path: Path, no_rounds: list[Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(1, "bench", tmp_path, parts=("is not a bundle",))
    refused(1, "bench", made, "--precision", "fp16", parts=("has no fp16 graphs", "export it"))
    refused(2, "bench", made, "--json", tmp_path, parts=("is a folder",))
    (tmp_path / "file").write_text("x")
    refused(2, "bench", made, "--json", tmp_path / "file" / "b.json", parts=("cannot be written",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figure = tmp_path / "b.png"
    refused(1, "bench", made, "--plot", figure, parts=("pip install", '"matplotlib>='))
    assert not no_rounds
    assert not figure.exists()


def test_a_damaged_bundle(bundle: Path, no_rounds: list[Comparison]) -> None:
    with (bundle / "fp32" / "weights.bin").open("r+b") as stream:
        stream.write(b"\xff\xff")
    refused(1, "bench", bundle, parts=("does not match its hash",))
    assert not no_rounds


def test_a_program_that_is_missing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OURS", "var_deploy.no_such_module")
    monkeypatch.setattr(module, "RATES", "var_deploy.no_such_module")
    result = run("bench", made, *QUICK)
    assert result.exit_code == 1
    assert "No module named var_deploy.no_such_module" in result.stderr
    assert "the rates of this machine are unknown" in result.stdout
