"""The run: who is asked when, and what becomes of those who fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fake_worker import LAUNCHES, RATE, command
from var_deploy.bench import rounds as module
from var_deploy.bench.power import EnergyCounter, Meters
from var_deploy.bench.process import WorkerProcess
from var_deploy.bench.rates import Rates
from var_deploy.bench.rounds import Comparison, Entry, Rounds

ONCE = Rounds(images=1, warm_up=0, repeat=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAUSE", "ENERGY_SECONDS", "SETTLE_SECONDS"):
        monkeypatch.setattr(module, name, 0.0)


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., Comparison]:
    """Runs fakes by name and manner; their log is `log` in tmp_path."""
    log = tmp_path / "log"

    def run(
        manners: dict[str, str],
        rounds: Rounds = ONCE,
        rates: str = "rates",
        progress: Callable[[str, float], object] = lambda message, fraction: None,
    ) -> Comparison:
        entries = [
            Entry(name=name, ours=name == "ours", command=command(name, log, manner))
            if manner != "absent"
            else Entry(name=name, ours=False, problem="it is not installed")
            for name, manner in manners.items()
        ]
        comparison = Comparison(entries, command("rates", log, rates), rounds, progress)
        comparison.run()
        return comparison

    return run


def test_they_take_turns(compare: Callable[..., Comparison], tmp_path: Path) -> None:
    rounds = Rounds(images=1, warm_up=1, repeat=3)
    told: list[tuple[str, float]] = []
    found = compare({"ours": "", "peer": ""}, rounds, progress=lambda *a: told.append(a))
    alone = ["ours", "ours", "peer", "peer"]
    first = ["rates", "ours", "peer"]
    in_turn = ["ours", "peer"] + 3 * ["rates", "ours", "peer"]
    assert (tmp_path / "log").read_text().split() == alone + first + in_turn
    for result in found.results:
        assert (len(result.samples), result.problem) == (3, "")
        assert result.ran
        assert result.about is not None and result.about.settings["name"] == result.name
        assert result.cold is not None and result.cold > 0
        assert list(result.cold_parts) == ["imports", "checking", "opening", "first image"]
        assert result.cold_parts["opening"] == 0.0002, "as the worker tells it"
        assert min(result.cold_parts.values()) > 0
        assert sum(result.cold_parts.values()) == pytest.approx(result.cold)
        assert result.peak is not None and result.peak > 1 << 20
        assert result.energy.joules is None
    assert len(found.rated.samples) == 3
    assert told[0] == ("ours: memory", 0.0)
    assert told[-1][0] == "round 3 of 3: peer"
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and fractions[-1] <= 1


def test_a_failure_stops_nobody_else(compare: Callable[..., Comparison]) -> None:
    manners = {"ours": "", "refuses": "refuses", "dies": "dies later", "absent": "absent"}
    found = compare(manners, Rounds(images=1, warm_up=0, repeat=3))
    ours, refuses, dies, absent = found.results
    assert ours.ran and len(ours.samples) == 3
    assert refuses.problem == "ValueError: no such precision"
    assert "ended by signal 15" in dies.problem
    assert len(dies.samples) == 1, "the second round was its third generation"
    assert absent.problem == "it is not installed"
    assert not any(result.ran for result in (refuses, dies, absent))


def test_a_worker_that_does_not_tell_its_loading(compare: Callable[..., Comparison]) -> None:
    (found,) = compare({"ours": "says little"}).results
    assert found.ran and found.cold is not None
    assert found.cold_parts == {}


@pytest.mark.parametrize("manner", ["refuses", "dies later"])
def test_rates_that_fail_leave_the_times(compare: Callable[..., Comparison], manner: str) -> None:
    found = compare({"ours": ""}, Rounds(images=1, warm_up=0, repeat=2), rates=manner)
    assert found.rated.samples == () and found.rated.problem
    assert len(found.results[0].samples) == 2


def test_memory_that_nobody_tells(compare: Callable[..., Comparison], tmp_path: Path) -> None:
    found = compare({"ours": ""}, Rounds(images=1, warm_up=0, repeat=1, proc=tmp_path / "none"))
    assert found.results[0].ran
    assert found.results[0].peak is None
    assert "smaps_rollup" in found.results[0].peak_problem


def test_energy_is_counted_an_image(compare: Callable[..., Comparison], tmp_path: Path) -> None:
    log = tmp_path / "log"
    counter = EnergyCounter("package-0", lambda: 6_000_000 * len(log.read_text().split()), 10**9)
    meters = Meters(found=[counter])
    found = compare({"ours": "", "peer": ""}, Rounds(images=3, warm_up=0, repeat=1, meters=meters))
    for result in found.results:
        assert result.energy.by_source == {"package-0": pytest.approx(2.0)}, "6 J a generation"


def test_one_that_fails_at_the_end_has_failed(compare: Callable[..., Comparison]) -> None:
    """Its time says nothing once it cannot go on."""
    meters = Meters(found=[EnergyCounter("package-0", lambda: 0, 1)])
    found = compare({"ours": "dies later"}, Rounds(images=1, warm_up=0, repeat=1, meters=meters))
    assert len(found.results[0].samples) == 1
    assert "ended by signal" in found.results[0].problem


def test_ctrl_c_ends_everybody(compare: Callable[..., Comparison]) -> None:
    started: list[WorkerProcess] = []

    def start(command: Sequence[str]) -> WorkerProcess:
        started.append(WorkerProcess(command))
        return started[-1]

    def progress(message: str, fraction: float) -> None:
        if message == "round 1 of 1: peer":
            raise KeyboardInterrupt

    rounds = Rounds(images=1, warm_up=0, repeat=1, start=start)
    with pytest.raises(KeyboardInterrupt):
        compare({"ours": "", "peer": ""}, rounds, progress=progress)
    assert len(started) == 5
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_what_the_rates_come_to(compare: Callable[..., Comparison]) -> None:
    rated: Any = compare({"ours": ""}).rated
    rates = Rates.of(rated.samples, rated.about.threads)
    assert rates.gemm == {"fp32": pytest.approx(RATE), "int8": pytest.approx(RATE)}
    assert rates.conv == {"fp32": pytest.approx(RATE), "int8": pytest.approx(RATE)}
    assert rates.bandwidth == pytest.approx(RATE)
    assert rates.threads == 2
    assert rates.to_json()["probes"]["gemm_fp32 72"] == pytest.approx(RATE)
    assert sum(LAUNCHES.values()) < 0.010
