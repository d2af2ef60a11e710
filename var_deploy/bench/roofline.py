"""The least time that a device's rates allow, and how near to it a run came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy.planning.costs import Workload
from var_deploy.planning.devices import Device
from var_deploy.planning.plan import launch_times
from var_deploy.runtime.measure import LatencyStats


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least time of one launch, twice: to move its bytes, and to do its operations."""

    name: str
    traffic: int
    operations: int
    moving: float
    computing: float

    @property
    def seconds(self) -> float:
        return max(self.moving, self.computing)


def rooflines(workload: Workload, device: Device) -> list[Roofline]:
    """Floors of every launch of B images, as `plan` counts bytes and operations."""
    return [
        Roofline(
            name=launch.work.name,
            traffic=launch.work.traffic,
            operations=launch.work.compute_operations + launch.work.full_operations,
            moving=launch.moving,
            computing=launch.computing,
        )
        for launch in launch_times(workload, device)
    ]


def reached(
    launches: Mapping[str, LatencyStats], whole: LatencyStats, least: Sequence[Roofline]
) -> dict[str, Any]:
    """What part of the measured times the floors are: 1 is the floor itself."""
    rows = []
    for roofline in least:
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
    seconds = sum(roofline.seconds for roofline in least)
    return {
        "floor_ms": round(seconds * 1e3, 5),
        "measured_ms": round(whole.median * 1e3, 5),
        "reached": round(seconds / whole.median, 4),
        "launches": rows,
    }
