"""Energy, read from machines that are not here."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from pathlib import Path

import pytest

from fake_machine import FakeMachine, jetson, workstation
from var_deploy.bench import power
from var_deploy.bench.power import (
    SMI,
    EnergyCounter,
    Meters,
    PowerSamples,
    find_meters,
    measure,
)
from var_deploy.host.machine import Answer

PC = FakeMachine()


def write(root: Path, **files: object) -> Path:
    """Files of a folder, made as it is named."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).write_text(f"{content}\n")
    return root


def zone(root: Path, number: str, name: str, energy: int = 0, span: int = 1000) -> Path:
    folder = root / "sys/class/powercap" / f"intel-rapl:{number}"
    return write(folder, name=name, energy_uj=energy, max_energy_range_uj=span)


def rail(root: Path, channel: int, label: str, millivolts: int, milliamperes: int) -> None:
    files = {
        f"in{channel}_label": label,
        f"in{channel}_input": millivolts,
        f"curr{channel}_input": milliamperes,
    }
    write(root / "sys/class/hwmon/hwmon1", **files)


def test_a_counter_that_starts_again() -> None:
    readings = iter([200, 700, 900, 150])
    counter = EnergyCounter("package-0", lambda: next(readings), 1000)
    counter.start()
    assert counter.stop() == pytest.approx(500e-6)
    counter.start()
    assert counter.stop() == pytest.approx(250e-6), "900 … 1000, and 150 more"


def test_packages_and_their_memory_add_up(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", 1_000_000, 10**9)
    memory = zone(tmp_path, "0:1", "dram", 0, 10**9)
    for number, name in (("0:0", "core"), ("1", "psys")):
        zone(tmp_path, number, name)
    write(tmp_path / "sys/class/powercap/intel-rapl-mmio:0", name="package-0", energy_uj=0)
    meters = find_meters(PC, tmp_path)
    assert [meter.name for meter in meters.found] == ["package-0", "dram-0"]
    assert meters.problem == ""

    def work() -> int:
        write(package, energy_uj=9_000_000)
        write(memory, energy_uj=2_000_000)
        return 4

    energy = measure(meters, work)
    assert energy.by_source == pytest.approx({"package-0": 2.0, "dram-0": 0.5})
    assert energy.joules == pytest.approx(2.5)
    assert energy.to_json()["an_image"] == 2.5


def test_counters_that_are_for_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "0", "package-0")
    read = Path.read_text

    def guarded(path: Path, *options: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *options)

    monkeypatch.setattr(Path, "read_text", guarded)
    meters = find_meters(PC, tmp_path)
    assert meters.found == []
    assert meters.problem.endswith("intel-rapl:0/energy_uj is for root alone")
    energy = measure(meters, lambda: 1)
    assert (energy.joules, energy.problem) == (None, meters.problem)


def test_a_counter_that_goes_away(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0")
    meters = find_meters(PC, tmp_path)

    def work() -> int:
        (package / "energy_uj").write_text("")
        return 1

    energy = measure(meters, work)
    assert energy.joules is None
    assert energy.to_json()["an_image"] is None
    assert "energy_uj holds no number: ''" in energy.problem


@pytest.mark.parametrize(
    ("rails", "name", "watts"),
    [
        ({"VDD_IN": (5000, 2000), "VDD_SOC": (5000, 300)}, "VDD_IN", 10.0),
        (
            {"VDD_GPU_SOC": (20000, 500), "VDD_CPU_CV": (20000, 100), "VIN_SYS_5V0": (5000, 1000)},
            "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0",
            17.0,
        ),
    ],
)
def test_rails_of_a_jetson(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rails: dict[str, tuple[int, int]],
    name: str,
    watts: float,
) -> None:
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        rail(tmp_path, channel, label, millivolts, milliamperes)
    meters = find_meters(jetson(), tmp_path)
    (meter,) = meters.found
    assert (meter.name, meters.problem) == (name, ""), "nvidia-smi knows nothing of a board"
    seconds = itertools.count()
    monkeypatch.setattr(power.time, "perf_counter", lambda: float(next(seconds)))
    meter.start()
    joules = meter.stop()
    elapsed = next(seconds) - 1  # by this clock every reading takes a second
    assert elapsed >= 1
    assert joules == pytest.approx(watts * elapsed)


def test_power_is_summed_by_the_trapezoidal_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    moments, watts = iter([0.0, 1.0, 3.0, 4.0]), iter([10.0, 20.0, 20.0, 0.0])
    twice = threading.Event()
    monkeypatch.setattr(power.time, "perf_counter", lambda: next(moments))

    def read() -> float:
        value = next(watts)
        if value == 20.0 and not asked.append(value) and len(asked) == 2:
            twice.set()
            samples._done.wait()
        return value

    asked: list[float] = []
    samples = PowerSamples("rail", read, seconds=0.0)
    samples.start()
    assert twice.wait(10)
    assert samples.stop() == pytest.approx(15.0 + 40.0 + 10.0)


def test_a_card_tells_its_power(tmp_path: Path) -> None:
    machine = dataclasses.replace(workstation(), programs={SMI: Answer(output="71.25\n")})
    meters = find_meters(machine, tmp_path)
    assert [meter.name for meter in meters.found] == ["GPU 0"]
    joules = measure(meters, lambda: 1).joules
    assert joules is not None and joules > 0
    silent = dataclasses.replace(workstation(), programs={SMI: Answer(output="[N/A]\n")})
    assert find_meters(silent, tmp_path).problem == "nvidia-smi: [N/A]"
    assert find_meters(workstation(), tmp_path).problem == (
        "nvidia-smi: nvidia-smi is not installed"
    )


def test_a_sampler_that_fails_says_so() -> None:
    readings = iter([1.0])

    def read() -> float:
        try:
            return next(readings)
        except StopIteration:
            raise OSError("the sensor is gone") from None

    energy = measure(Meters(found=[PowerSamples("rail", read, 0.0)]), lambda: 1)
    assert (energy.joules, energy.problem) == (None, "the sensor is gone")


def test_a_machine_that_reports_nothing(tmp_path: Path) -> None:
    meters = find_meters(PC, tmp_path)
    assert meters.found == []
    assert "nothing here reports power" in meters.problem
