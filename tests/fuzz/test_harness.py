"""The fuzzing harness counts each kind of failure, and goes on after it."""

from __future__ import annotations

import pytest

from fuzz.attempts import misbehave
from fuzz.harness import run_cases, scaled

CASES = ["", "refuse", "ramble", "repeat", "half", "crash", "die", "hang", "swell", "burst"]


def test_every_kind_of_failure_is_counted() -> None:
    counts = run_cases("harness", [*CASES, "shout", "", "refuse"], misbehave, 3, 60, valid="")
    assert (counts.accepted, counts.refused) == (2, 2)
    assert [line.split()[-1] for line in counts.wrong] == [
        "['ramble']",
        "['repeat']",
        "['half']",
        "['shout']",
    ]
    assert [line.split()[-1] for line in counts.hung] == ["['hang']"]
    assert [line.split()[-1] for line in counts.over_memory] == ["['swell']"]
    # what asks for more than four times its share is stopped by the system
    assert [line.split()[-1] for line in counts.crashed] == ["['crash']", "['die']", "['burst']"]
    assert counts.tried == len(CASES) + 3
    assert str(counts).startswith("harness: 13 tried, 2 accepted, 2 refused in one line, 4 wrong")


def test_a_valid_case_that_is_refused_stops_the_run() -> None:
    with pytest.raises(AssertionError, match="the valid case was not accepted: refused"):
        run_cases("harness", [""], misbehave, 3, 60, valid="refuse")


def test_more_cases_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VAR_DEPLOY_FUZZ", raising=False)
    assert scaled(200) == 200
    monkeypatch.setenv("VAR_DEPLOY_FUZZ", "20")
    assert scaled(200) == 4000
