"""The report of `bench`: results, and the machine that they were measured on."""

from __future__ import annotations

import dataclasses
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from var_deploy import __version__
from var_deploy.bench.power import Energy
from var_deploy.bench.rates import Rates
from var_deploy.bench.roofline import Roofline, reached
from var_deploy.bench.worker import About, Sample
from var_deploy.errors import UsageError
from var_deploy.host.machine import Machine, jetson_model
from var_deploy.manifest import Manifest
from var_deploy.planning.devices import cpu_device
from var_deploy.runtime.measure import LatencyStats

SCHEMA_VERSION = 1
# instruction sets that decide the speed of products, by their names in Linux
ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The machine. `isa`: those of ISA that it has; `memory`: bytes, 0 where unknown."""

    cpu: str
    processors: int
    isa: tuple[str, ...]
    memory: int
    system: str
    python: str

    @classmethod
    def of(cls, machine: Machine) -> Surroundings:
        text = machine.read("/proc/cpuinfo") or ""
        flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.M)).split())
        release = re.search(
            r'^PRETTY_NAME="?([^"\n]*)', machine.read("/etc/os-release") or "", re.M
        )
        try:
            device = cpu_device(machine)
            cpu, memory = device.title, device.memory
        except UsageError:  # it has no /proc/meminfo
            cpu, memory = platform.processor() or machine.platform(), 0
        return cls(
            cpu=jetson_model(machine) or cpu,
            processors=machine.threads(),
            isa=tuple(flag for flag in ISA if flag in flags),
            memory=memory,
            system=", ".join(filter(None, (release and release[1], machine.platform()))),
            python=".".join(map(str, machine.python())),
        )


@dataclass(kw_only=True)
class Result:
    """The result of one worker; filled during the run.

    Attributes:
        name: name in the table; `ours`: whether it runs this project's runtime.
        about: the worker's description, None where it did not get ready.
        problem: why it could not run, "" where it could.
        cold: seconds from the start of its process to its first image; `cold_parts`: parts of it
            → seconds, in order, empty where the worker does not tell them.
        peak: peak PSS in bytes, None where unknown; `peak_problem`: the reason.
        samples: one sample per round.
        weights: bytes of the weights that it uses, None where unknown.
        rooflines: the least time of each launch; `roofline_problem`: why there are none.
    """

    name: str
    ours: bool
    about: About | None = None
    problem: str = ""
    cold: float | None = None
    cold_parts: Mapping[str, float] = field(default_factory=dict)
    peak: int | None = None
    peak_problem: str = ""
    samples: list[Sample] = field(default_factory=list)
    energy: Energy = field(default_factory=Energy)
    weights: int | None = None
    rooflines: Sequence[Roofline] = ()
    roofline_problem: str = ""

    @property
    def ran(self) -> bool:
        return not self.problem and bool(self.samples)

    @property
    def whole(self) -> LatencyStats:
        """Statistics of the time of one generation."""
        return LatencyStats.of([sample.seconds for sample in self.samples])

    @property
    def launches(self) -> dict[str, LatencyStats]:
        """Launch → statistics of its time; empty where the worker does not tell them apart."""
        names = self.samples[0].launches if self.samples else {}
        if any(sample.launches.keys() != names.keys() for sample in self.samples):
            return {}
        return {name: LatencyStats.of([s.launches[name] for s in self.samples]) for name in names}

    @property
    def host_share(self) -> float | None:
        """Share of a generation's time that is spent outside of all launches."""
        if not self.launches:
            return None
        return statistics.median(1 - sum(s.launches.values()) / s.seconds for s in self.samples)

    @property
    def cold_over_warm(self) -> float | None:
        """The time of the first image of a cold process, divided by that of a warm one."""
        return self.cold / self.whole.median if self.cold and self.ran else None

    @property
    def peak_over_weights(self) -> float | None:
        return self.peak / self.weights if self.peak and self.weights else None

    @property
    def reached(self) -> float | None:
        """The least time of a generation by its roofline, divided by the measured time."""
        if not self.rooflines:
            return None
        return sum(roofline.seconds for roofline in self.rooflines) / self.whole.median

    def to_json(self, images: int, first: Result | None) -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": self.name,
            "ours": self.ours,
            "runs_on": self.about.to_json() if self.about else {},
            "problem": self.problem,
            "cold_s": _rounded(self.cold, 4),
            "cold_parts_s": {part: round(s, 4) for part, s in self.cold_parts.items()},
            "cold_over_warm": _rounded(self.cold_over_warm, 4),
            "memory": {
                "peak_pss": self.peak,
                "weights": self.weights,
                "peak_over_weights": _rounded(self.peak_over_weights, 4),
                "problem": self.peak_problem,
            },
            "joules": self.energy.to_json(),
        }
        if not self.ran:
            return data
        ratio = self.whole.median / first.whole.median if first else None
        return {
            **data,
            "generation": self.whole.to_json(),
            "images_per_second": round(images / self.whole.median, 5),
            "ratio": _rounded(ratio, 5),
            "host_share": _rounded(self.host_share, 5),
            "launches": {name: spread.to_json() for name, spread in self.launches.items()},
            "floor": reached(self.launches, self.whole, self.rooflines) if self.rooflines else None,
            "floor_problem": self.roofline_problem,
        }


@dataclass(frozen=True, kw_only=True)
class Run:
    """The results of all workers for one number of images per generation."""

    images: int
    results: Sequence[Result]
    rates: Rates | None
    rates_problem: str = ""

    @property
    def first(self) -> Result | None:
        """The result that ratios refer to: the first worker that ran."""
        return next((result for result in self.results if result.ran), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "rates": self.rates.to_json() if self.rates else None,
            "rates_problem": self.rates_problem,
            "contenders": [result.to_json(self.images, self.first) for result in self.results],
        }


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """The report of one call of `bench`, with all runs.

    Attributes:
        settings: threads, rounds and so on, as JSON values.
        date: ISO 8601, UTC.
    """

    name: str
    manifest: Manifest
    surroundings: Surroundings
    settings: Mapping[str, Any]
    date: str
    runs: Sequence[Run]

    @property
    def failed(self) -> list[Result]:
        """The results of this project's workers that did not run."""
        return [r for run in self.runs for r in run.results if r.ours and not r.ran]

    def to_json(self) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "schema_version": SCHEMA_VERSION,
            "var_deploy": __version__,
            "date": self.date,
            "machine": dataclasses.asdict(self.surroundings),
            "bundle": {
                "name": self.name,
                "digest": manifest.digest(),
                "preset": manifest.preset,
                "random_weights": manifest.checkpoint.get("transformer", {}).get("random_weights"),
                "batch": manifest.batch,
                "guidance": manifest.guidance,
                "sampling": dataclasses.asdict(manifest.defaults),
            },
            "settings": dict(self.settings),
            "runs": [run.to_json() for run in self.runs],
        }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
