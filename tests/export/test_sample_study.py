"""int8 judged by many images: the measures, the bound, and pocket itself with a few."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.errors import BackendError, UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, load_model
from var_deploy.export.verify import samples as sample_study
from var_deploy.export.verify.bundle import verify_bundle
from var_deploy.export.verify.report import Check, VerifyReport
from var_deploy.export.verify.samples import (
    SampleSet,
    SampleStudy,
    SkippedStudy,
    frechet_distance,
    study_samples,
)
from var_deploy.manifest import read_manifest

# --- the distance


def sample(count: int, mean: Any, covariance: Any, seed: int = 0) -> NDArray[np.float64]:
    """[count, F] with exactly this mean and covariance."""
    covariance = np.asarray(covariance, float)
    x = np.random.default_rng(seed).standard_normal((count, len(covariance)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + np.asarray(mean)


def test_the_distance_of_gaussians_is_the_known_one() -> None:
    """Covariances that commute: |μ₁ - μ₂|² + Σ (σ₁ - σ₂)² over their common axes."""
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
    first, second = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
    one = sample(50, [0, 0, 0], turn @ np.diag(first) @ turn.T)
    other = sample(80, [1, -2, 0], turn @ np.diag(second) @ turn.T, seed=2)
    expected = 1 + 4 + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert frechet_distance(one, other) == pytest.approx(expected)
    assert frechet_distance(other, one) == pytest.approx(expected)
    assert frechet_distance(one, one + 3) == pytest.approx(27)


def test_the_distance_of_covariances_that_do_not_commute() -> None:
    """Against the eigenvalues of the product, which are not symmetric to work with."""
    a, b = [[2.0, 0.9], [0.9, 1.0]], [[1.0, -0.6], [-0.6, 3.0]]
    one, other = sample(40, [0, 0], a), sample(40, [0, 0], b, seed=5)
    roots = np.sqrt(np.linalg.eigvals(np.array(a) @ np.array(b)))
    expected = np.trace(a) + np.trace(b) - 2 * roots.sum()
    assert frechet_distance(one, other) == pytest.approx(expected)


def test_small_sets_have_a_distance() -> None:
    """Fewer samples than features: the covariances are singular."""
    random = np.random.default_rng(3)
    one = random.standard_normal((10, 96)).astype(np.float32)
    other = random.standard_normal((12, 96)).astype(np.float32)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, one[::-1]) == pytest.approx(0, abs=1e-6)
    found = frechet_distance(one, other)
    assert np.isfinite(found) and found > 1
    assert frechet_distance(one[:, :1], other[:, :1]) >= 0
    assert frechet_distance(np.ones((4, 5)), np.ones((6, 5))) == 0  # no spread at all


# --- the bound and what is told


def study(rounded: float, bound: float | None = 0.015, plain: float = 0.98) -> SampleStudy:
    def set_of(precision: str, seed: int, accuracy: float, first: Any, second: Any) -> SampleSet:
        return SampleSet(
            precision=precision, seed=seed, accuracy=accuracy, to_first=first, to_second=second
        )

    return SampleStudy(
        judge="pocket",
        count=500,
        fp32=set_of("fp32", 7, plain, None, 0.9),
        int8=set_of("int8", 7, rounded, 0.15, 0.95),
        noise=set_of("fp32", 8, 0.976, 0.9, None),
        bound=bound,
    )


def report_of(samples: SampleStudy | SkippedStudy) -> VerifyReport:
    return VerifyReport(
        checks=(Check(precision="int8", graph="decoder", tensor="image"),),
        labels=(0,),
        seed=7,
        samples=samples,
    )


@pytest.mark.parametrize(
    ("accuracy", "holds"), [(0.98, True), (0.966, True), (0.964, False), (0.9951, False)]
)
def test_accuracy_is_bound(accuracy: float, holds: bool) -> None:
    report = report_of(study(accuracy))
    assert report.passed is holds
    if not holds:
        told = f"int8 samples: {accuracy:.1%} are of their class, 98.0% in fp32, bound 1.5 points"
        assert report.failure == told
        assert report.table().endswith(f"FAILED {told}")
    assert report_of(study(accuracy, bound=None)).passed, "too few to tell"


def test_every_set_has_a_line_and_the_json_has_all() -> None:
    report = report_of(study(0.978))
    lines = report.table().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("samples "))
    head, rule, *rows, how = lines[start : start + 6]
    assert "Fréchet distance to fp32 seed 7" in head and head.endswith("to fp32 seed 8")
    assert set(rule) == {"-"} and {len(head)} == {len(row) for row in rows}
    assert [row.split("  ")[0] for row in rows] == [
        "fp32 seed 7",
        "int8 seed 7",
        "fp32 seed 8 (noise alone)",
    ]
    assert rows[1].split()[-3:] == ["97.8%", "0.150", "0.950"]
    assert rows[2].split()[-3:] == ["97.6%", "0.900", "–"]
    named = "500 images a set, named by the classifier of pocket; accuracy of int8 within"
    assert how.startswith(named)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))["samples"]
    assert data["int8"]["to_first"] == 0.15 and data["fp32"]["to_first"] is None
    assert (data["bound"], data["failure"], data["count"]) == (0.015, None, 500)
    assert "not bound: fewer than 500" in study(0.9, bound=None).text()


# --- when there is nothing to judge

Model = Callable[..., LoadedModel]


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pocket in int8 alone; its manifest takes the reports of this module."""
    out = tmp_path_factory.mktemp("pocket-int8") / "bundle"
    options = ExportOptions(precisions=("int8",), layout="shared", batch=4)
    export_bundle(load_model("pocket"), out, options)
    return out


def test_why_nothing_is_judged_is_told(
    pocket: Path, small_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(folder: Path, model: LoadedModel, count: int = 20) -> SkippedStudy:
        study = study_samples(folder, read_manifest(folder), model, count=count)
        assert isinstance(study, SkippedStudy)
        assert study.text() == f"samples: not evaluated: {study.why}"
        assert report_of(study).passed is not study.failed
        assert report_of(study).to_json()["samples"]["skipped"] == study.why
        return study

    real = load_model("pocket")
    assert judged(pocket, real, count=0).why == "no samples were asked for"
    other = small_model()
    export_bundle(other, tmp_path / "other", ExportOptions(layout="shared"))
    why = "there is no classifier of this model, only of pocket"
    assert judged(tmp_path / "other", other).why == why
    blind = load_model("pocket", random_weights=1)
    export_bundle(blind, tmp_path / "blind", ExportOptions(layout="shared"))
    assert "random weights" in judged(tmp_path / "blind", blind).why

    def refuse(*arguments: Any) -> None:
        raise BackendError("no room")

    monkeypatch.setattr(sample_study, "_draw", refuse)
    failing = judged(pocket, real)
    assert failing.failed and report_of(failing).failure == "int8 samples: no room"


@pytest.mark.parametrize("count", [1, 19])
def test_too_few_samples_are_refused(count: int, pocket: Path) -> None:
    with pytest.raises(UsageError, match=f"0 or at least 20, found {count}"):
        verify_bundle(pocket, samples=count)


# --- pocket


def test_pocket_is_judged_through_its_bundle(pocket: Path) -> None:
    """Its fp32 images come from graphs that are exported for the purpose."""
    told: list[tuple[str, float]] = []
    report = verify_bundle(
        pocket, samples=20, images=1, seed=2**64 - 4, progress=lambda *step: told.append(step)
    )
    # its decoder is no matter of samples, and has a test of its own
    assert all(c.passed for c in report.checks if not c.graph.startswith("decoder"))
    found = report.samples
    assert isinstance(found, SampleStudy)
    assert (found.judge, found.count, found.bound) == ("pocket", 20, None)
    assert [(s.precision, s.seed) for s in (found.fp32, found.int8, found.noise)] == [
        ("fp32", 2**64 - 4),
        ("int8", 2**64 - 4),
        ("fp32", 2**64 - 3),
    ]
    for images in (found.fp32, found.int8, found.noise):
        assert images.accuracy >= 0.8
    near, noise = found.int8.to_first, found.noise.to_first
    assert near is not None and noise is not None and 0 < near < noise
    assert found.int8.to_second is not None and found.fp32.to_first is None
    assert found.fp32.to_second == pytest.approx(noise)
    stored = read_manifest(pocket).parity
    assert stored == report.to_json() and stored["samples"]["count"] == 20
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert len([f for message, f in told if message == "samples"]) > 10
    assert {path.name for path in pocket.iterdir()} == {"int8", names.MANIFEST}


def test_sets_are_drawn_from_the_same_numbers(
    pocket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int, tuple[int, ...]]] = []

    def draw(bundle: Path, precision: str, labels: Any, seed: int, report: Any) -> Any:
        drawn.append((precision, seed, tuple(labels)))
        random = np.random.default_rng(seed)
        return random.integers(0, 256, (len(labels), 64, 64, 3)).astype(np.uint8)

    monkeypatch.setattr(sample_study, "_draw", draw)
    manifest = dataclasses.replace(read_manifest(pocket), graphs={p: {} for p in ("fp32", "int8")})
    found = study_samples(pocket, manifest, load_model("pocket"), count=500, seed=3)
    assert isinstance(found, SampleStudy) and found.bound == 0.015
    labels = tuple(i % 10 for i in range(500))
    assert drawn == [("fp32", 3, labels), ("int8", 3, labels), ("fp32", 4, labels)]
    assert found.int8.to_first == pytest.approx(0, abs=1e-4) and found.failure is None
