"""Rooflines: the least time of a launch by a device's rates, and the share that was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy.config import Precision
from var_deploy.planning.devices import Device
from var_deploy.planning.plan import computing_seconds, launch_times
from var_deploy.planning.workload import Work, Workload
from var_deploy.runtime.measure import LatencyStats


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least seconds of one launch: `moving` its bytes, and `computing` its operations."""

    name: str
    traffic: int
    operations: int
    moving: float
    computing: float

    @property
    def seconds(self) -> float:
        return max(self.moving, self.computing)


def rooflines(workload: Workload, device: Device) -> list[Roofline]:
    """The roofline of every launch of B images, with bytes and operations as in `plan`."""
    return [
        _roofline(launch.work, launch.moving, launch.computing)
        for launch in launch_times(workload, device)
    ]


def roofline_of(work: Work, device: Device, precision: Precision) -> Roofline:
    """The roofline of other work than that of a generation, such as a text encoder's."""
    moving = work.traffic / device.bandwidth
    return _roofline(work, moving, computing_seconds(work, precision, device))


def _roofline(work: Work, moving: float, computing: float) -> Roofline:
    return Roofline(
        name=work.name,
        traffic=work.traffic,
        operations=work.compute_operations + work.full_operations,
        moving=moving,
        computing=computing,
    )


def reached(
    launches: Mapping[str, LatencyStats], whole: LatencyStats, rooflines: Sequence[Roofline]
) -> dict[str, Any]:
    """The least times divided by the measured times, as JSON values; 1 is the roofline."""
    rows = []
    for roofline in rooflines:
        measured = launches.get(roofline.name)
        rows.append(
            {
                "launch": roofline.name,
                "bytes": roofline.traffic,
                "operations": roofline.operations,
                "moving_ms": round(roofline.moving * 1e3, 5),
                "computing_ms": round(roofline.computing * 1e3, 5),
                "measured_ms": measured and round(measured.median * 1e3, 5),
                "reached": measured and round(roofline.seconds / measured.median, 4),
            }
        )
    seconds = sum(roofline.seconds for roofline in rooflines)
    return {
        "floor_ms": round(seconds * 1e3, 5),
        "measured_ms": round(whole.median * 1e3, 5),
        "reached": round(seconds / whole.median, 4),
        "launches": rows,
    }
