"""The golden bundles pass `verify` in both precisions, and their manifests say so."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from var_deploy import names
from var_deploy.export.verify.bundle import verify_model
from var_deploy.manifest import read_manifest


@pytest.mark.parametrize("case", ["seeded-adaln", "seeded-shared-aln"])
def test_golden_bundles_pass_in_both_precisions(
    case: str,
    load_case: Callable[[str], Any],
    golden_bundle: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    golden = load_case(case)
    bundle = Path(shutil.copytree(golden_bundle(case), tmp_path / "bundle"))
    before = read_manifest(bundle)
    assert before.parity is None
    told: list[tuple[str, float]] = []
    report = verify_model(
        bundle, golden.model, progress=lambda message, fraction: told.append((message, fraction))
    )
    assert report.passed, report.table()
    assert report.failure is None

    scales = range(golden.spec.scales)
    expected = [
        names.CONDITION,
        *(names.scale_graph(k) for k in scales),
        *(f"{names.STEP} @ {k}" for k in scales),
        names.DECODER,
        names.ENCODER,
        names.ACCUMULATE,
        "loop shared",
        "loop per-scale",
    ]
    for precision, bound in (("fp32", 2e-4), ("fp16", 3e-2)):
        checks = {c.graph: c for c in report.checks if c.precision == precision}
        assert list(checks) == expected
        for name, check in checks.items():
            # two implementations: no difference at all would mean that nothing was compared
            assert check.error > 0 and 0 < check.relative <= check.bound, name
            if name.startswith(("scale", "step")):
                assert check.bound == bound
        total = golden.spec.total_tokens * len(report.labels)
        for name in ("loop shared", "loop per-scale"):
            psnr = checks[name].psnr
            assert psnr is not None and psnr > (100 if precision == "fp32" else 50)
            if precision == "fp32":
                assert checks[name].tokens == f"{total}/{total}"
    assert report.checks[0].precision == "fp32"
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert f"fp32/{names.scale_graph(1)}" in [message for message, _ in told]

    after = read_manifest(bundle)
    assert after.parity == report.to_json()
    assert after.digest() == before.digest()
    assert dataclasses.replace(after, parity=None) == before
