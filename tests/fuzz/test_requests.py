"""Damaged requests against a live service: a reason in one line, or an answer, and nothing else."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from fuzz.harness import run_cases, scaled
from fuzz.requests import attempt, request

pytest.importorskip("fastapi", reason="the extra serve is not installed")

CASES = 300
SECONDS = 60
MEGABYTES = 100


def test_a_number_names_a_request() -> None:
    assert [request(n) for n in range(20)] == [request(n) for n in range(20)]
    assert len({request(n) for n in range(200)}) > 190


def test_damaged_requests(pocket_bundle: Path) -> None:
    attempts = functools.partial(attempt, pocket_bundle)
    counts = run_cases("requests", range(scaled(CASES)), attempts, SECONDS, MEGABYTES)
    assert not counts.failures, "\n".join(counts.failures)
    assert counts.tried == scaled(CASES)
    assert counts.accepted > counts.tried // 20 and counts.refused > counts.tried // 3
