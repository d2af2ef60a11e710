"""Manifests and graphs with seeded damage: each is refused in one line, or works."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuzz.bundles import damaged_graph, damaged_manifest, read_case
from fuzz.harness import run_cases, scaled

pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")

SECONDS, MEGABYTES = 30, 300


@pytest.fixture(scope="module")
def small_bundle(
    tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]
) -> Path:
    from var_deploy.export.bundle import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("fuzz") / "bundle"
    export_bundle(small_model(depth=1, patch_nums=(1, 2)), out, ExportOptions(layout="shared"))
    return out


def test_damaged_manifests(small_bundle: Path) -> None:
    text = (small_bundle / "manifest.json").read_text()
    cases = [("manifest.json", damaged_manifest(text, seed)) for seed in range(scaled(200))]
    attempt = functools.partial(read_case, small_bundle)
    valid = ("manifest.json", text.encode())
    counts = run_cases("manifests", cases, attempt, SECONDS, MEGABYTES, valid=valid)
    assert not counts.failures, "\n".join(counts.failures)
    assert counts.refused > 0.8 * counts.tried


def test_damaged_graphs(small_bundle: Path) -> None:
    files = [f"fp32/{name}.onnx" for name in ("step", "decoder", "encoder", "accumulate")]
    cases = []
    for seed in range(scaled(120)):
        file = files[seed % len(files)]
        cases.append((file, damaged_graph((small_bundle / file).read_bytes(), seed)))
    attempt = functools.partial(read_case, small_bundle)
    valid = (files[0], (small_bundle / files[0]).read_bytes())
    counts = run_cases("graphs", cases, attempt, SECONDS, MEGABYTES, valid=valid)
    assert not counts.failures, "\n".join(counts.failures)
    assert counts.refused > 0.5 * counts.tried
