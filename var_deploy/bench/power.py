"""Measures energy where a machine reports it: RAPL on PCs, power rails of a Jetson, NVIDIA cards.

Each source is a `Meter`, started before the work and stopped after it. Idle power is included.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from var_deploy.host.machine import Machine

SAMPLE_SECONDS = 0.1
# Rails that add up to the input power of a module; a board has one of these two sets. The second is
# that of AGX Orin: NVIDIA Jetson Linux Developer Guide, "Power Monitor", names the rails.
RAILS = (("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
SMI = ("nvidia-smi", "-i", "0", "--query-gpu=power.draw", "--format=csv,noheader,nounits")


class Meter(Protocol):
    """Measures joules between `start` and `stop`. Both raise OSError where reading fails."""

    @property
    def name(self) -> str: ...

    def start(self) -> None:
        """Start to measure."""
        ...

    def stop(self) -> float:
        """Stop to measure; returns the joules since `start`."""
        ...


class EnergyCounter:
    """A meter that reads a counter of microjoules, which wraps around at `span` at most once."""

    def __init__(self, name: str, read: Callable[[], int], span: int) -> None:
        self.name = name
        self._read, self._span, self._before = read, span, 0

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> float:
        counted = self._read() - self._before
        return 1e-6 * (counted if counted >= 0 else counted + self._span)


class PowerSamples:
    """A meter that samples watts in a thread and integrates them by the trapezoidal rule."""

    def __init__(
        self, name: str, read: Callable[[], float], seconds: float = SAMPLE_SECONDS
    ) -> None:
        self.name = name
        self._read, self._seconds = read, seconds
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._problem: OSError | None = None
        self._moment, self._watts, self._joules = 0.0, 0.0, 0.0

    def start(self) -> None:
        self._watts, self._joules, self._problem = self._read(), 0.0, None
        self._moment = time.perf_counter()
        self._done.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._problem:
            raise self._problem
        return self._joules

    def _sample(self) -> None:
        try:
            while not self._done.wait(self._seconds):
                self._add()
            self._add()
        except OSError as error:
            self._problem = error

    def _add(self) -> None:
        watts = self._read()
        moment = time.perf_counter()
        self._joules += (moment - self._moment) * (watts + self._watts) / 2
        self._moment, self._watts = moment, watts


@dataclass(frozen=True, kw_only=True)
class Meters:
    """The energy meters of a machine.

    Attributes:
        found: meters whose energy adds up; none is part of another.
        problem: why there are none, or why one is left out; "" without a problem.
    """

    found: Sequence[Meter] = ()
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules per image by source, or the problem why they are unknown."""

    by_source: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def joules(self) -> float | None:
        return sum(self.by_source.values()) if self.by_source else None

    def to_json(self) -> dict[str, Any]:
        joules = self.joules
        return {
            "an_image": None if joules is None else round(joules, 4),
            "by_source": {name: round(part, 4) for name, part in self.by_source.items()},
            "problem": self.problem,
        }


def measure(meters: Meters, work: Callable[[], int]) -> Energy:
    """Measure the energy of `work`, which returns its number of images."""
    if not meters.found:
        return Energy(problem=meters.problem)
    try:
        for meter in meters.found:
            meter.start()
        images = work()
        joules = {meter.name: meter.stop() / images for meter in meters.found}
    except OSError as error:
        return Energy(problem=_why(error))
    finally:
        for meter in meters.found:  # again, for meters that were not stopped above
            with contextlib.suppress(OSError):
                meter.stop()
    return Energy(by_source=joules, problem=meters.problem)


def find_meters(machine: Machine, root: Path = Path("/")) -> Meters:
    """Find all meters of this machine; `root` is the folder that contains sys/."""
    found: list[Meter] = []
    problems: list[str] = []
    for look in (_rapl, _rails):
        try:
            found += look(root)
        except OSError as error:
            problems.append(_why(error))
    if any(not gpu.integrated for gpu in machine.driver().gpus):
        answer = machine.run(*SMI)
        try:
            _watts(answer.output)
            found.append(PowerSamples("GPU 0", partial(_smi, machine)))
        except ValueError:
            problems.append(f"nvidia-smi: {answer.problem or answer.output.strip()}")
    if not found and not problems:
        problems.append("nothing here reports power: neither RAPL nor INA3221 rails nor nvidia-smi")
    return Meters(found=found, problem="; ".join(problems))


def _rapl(root: Path) -> list[Meter]:
    """RAPL meters of packages and memory; other zones (cores, graphics) are parts of a package.

    Linux, Documentation/power/powercap. AMD's processors come under the same names.
    """
    meters: list[Meter] = []
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip()
        if not name.startswith("package") and name != "dram":
            continue
        counter = zone / "energy_uj"
        span = _number(zone / "max_energy_range_uj")
        _number(counter)  # raises now where only root may read it
        package = zone.name.split(":")[1]
        label = name if name != "dram" else f"dram-{package}"
        meters.append(EnergyCounter(label, partial(_number, counter), span))
    return meters


def _number(path: Path) -> int:
    text = path.read_text()
    try:
        return int(text)
    except ValueError:
        raise OSError(f"{path} holds no number: {text.strip()[:40]!r}") from None


def _rails(root: Path) -> list[Meter]:
    """The meter of a Jetson module's input power: mV × mA of INA3221 channels."""
    rails: dict[str, tuple[Path, Path]] = {}
    for label in sorted((root / "sys/class/hwmon").glob("hwmon*/in*_label")):
        channel = re.fullmatch(r"in(\d+)_label", label.name)
        if channel:
            volts = label.with_name(f"in{channel[1]}_input")
            rails[label.read_text().strip()] = (volts, label.with_name(f"curr{channel[1]}_input"))
    for names in RAILS:
        if rails.keys() >= set(names):
            pairs = [rails[name] for name in names]
            _product(pairs)  # raises where a channel is switched off
            return [PowerSamples(" + ".join(names), partial(_product, pairs))]
    return []


def _product(rails: Sequence[tuple[Path, Path]]) -> float:
    return sum(1e-6 * _number(volts) * _number(amperes) for volts, amperes in rails)


def _smi(machine: Machine) -> float:
    answer = machine.run(*SMI)
    try:
        return _watts(answer.output)
    except ValueError:
        raise OSError(f"nvidia-smi: {answer.problem or answer.output.strip()}") from None


def _watts(text: str) -> float:
    return float(text.partition("\n")[0])


def _why(error: OSError) -> str:
    """The error in one line, with the name of the file."""
    if isinstance(error, PermissionError):
        return f"{error.filename} is for root alone"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
