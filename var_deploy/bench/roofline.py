"""The least time that a device's rates allow, and how near to it a run came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy.planning.costs import Workload
from var_deploy.planning.devices import Device
from var_deploy.planning.plan import launch_times
from var_deploy.runtime.measure import Spread


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of one launch, twice: to move its bytes, and to do its operations."""

    name: str
    traffic: int
    operations: int
    moving: float
    computing: float

    @property
    def seconds(self) -> float:
        return max(self.moving, self.computing)


def floors(workload: Workload, device: Device) -> list[Floor]:
    """Floors of every launch of B images, as `plan` counts bytes and operations."""
    return [
        Floor(
            name=launch.work.name,
            traffic=launch.work.traffic,
            operations=launch.work.compute_operations + launch.work.full_operations,
            moving=launch.moving,
            computing=launch.computing,
        )
        for launch in launch_times(workload, device)
    ]


def reached(
    launches: Mapping[str, Spread], whole: Spread, least: Sequence[Floor]
) -> dict[str, Any]:
    """What part of the measured times the floors are: 1 is the floor itself."""
    rows = []
    for floor in least:
        measured = launches.get(floor.name)
        rows.append(
            {
                "launch": floor.name,
                "bytes": floor.traffic,
                "operations": floor.operations,
                "moving_ms": round(floor.moving * 1e3, 5),
                "computing_ms": round(floor.computing * 1e3, 5),
                "measured_ms": measured and round(measured.median * 1e3, 5),
                "reached": measured and round(floor.seconds / measured.median, 4),
            }
        )
    seconds = sum(floor.seconds for floor in least)
    return {
        "floor_ms": round(seconds * 1e3, 5),
        "measured_ms": round(whole.median * 1e3, 5),
        "reached": round(seconds / whole.median, 4),
        "launches": rows,
    }
