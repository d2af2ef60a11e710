"""Images that are not numbers reach no file: one line, exit code 1, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_weights import poke

from cli_steps import export, refused, run, tree
from var_deploy.runtime import assembly

THREAD = ("--threads", 1)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not looked at, as if the values came up in a run of healthy ones."""
    monkeypatch.setattr(assembly, "check_weights", lambda *arguments: None)


@pytest.fixture
def black(made: Path, tmp_path: Path) -> Path:
    """A bundle whose images would be NaN."""
    weight, every = "decoder.conv_out.bias", 1
    return poke(made, tmp_path / "black", "fp32/decoder", weight, float("nan"), every)


def test_generate_writes_nothing(unchecked: None, black: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    out = tmp_path / "out"
    refused(1, "generate", black, "--out", out, *THREAD, parts=("graph decoder", "nan"))
    refused(1, "generate", black, "--out", out / "0.png", *THREAD, parts=("graph decoder",))
    assert tree(tmp_path) == before


def test_sample_is_not_complete(unchecked: None, black: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    result = run("sample", black, "--per-class", 1, "--shard-size", 3, *THREAD, "--out", out)
    assert result.exit_code == 1 and "complete" not in result.output
    assert "graph decoder" in result.stderr.splitlines()[-1]
    assert not list(out.glob("*.tar")) and not json.loads((out / "set.json").read_text())["shards"]


def test_a_bundle_with_such_weights_is_not_loaded(black: Path, tmp_path: Path) -> None:
    said = "value 0 of decoder.conv_out.bias is nan"
    refused(1, "generate", black, "--out", tmp_path / "0.png", *THREAD, parts=(said,))
    refused(1, "sample", black, "--per-class", 1, "--out", tmp_path / "set", *THREAD, parts=(said,))
    assert not (tmp_path / "0.png").exists() and not (tmp_path / "set").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_export_names_the_tensor(files: Path, tmp_path: Path, precision: str) -> None:
    state = torch.load(files / "var.pth", weights_only=True)
    state["blocks.1.ffn.fc2.weight"][3, 5] = np.nan
    torch.save(state, tmp_path / "var.pth")
    given = ("--tokenizer", files / "vae.pth", "--out", tmp_path / "out", "--precision", precision)
    said = "blocks.1.ffn.fc2.weight holds 1 value that is not finite (the first is nan at [3, 5])"
    refused(1, "export", "--checkpoint", tmp_path / "var.pth", *given, parts=(said,))
    assert {path.name for path in tmp_path.iterdir()} == {"var.pth"}
    assert export(files, tmp_path / "good").exit_code == 0
