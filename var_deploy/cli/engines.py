"""Lists the TensorRT engines of a bundle for `var-deploy inspect`: devices, and what is stale.

No TensorRT is needed for it, and whether they run on this machine is not looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_deploy.cli.console import human_bytes, paint, table
from var_deploy.errors import BackendError, BundleError
from var_deploy.manifest import Manifest

if TYPE_CHECKING:
    from var_deploy.runtime.tensorrt.engine_files import EngineFolder, EngineRecord

READY, STALE, DAMAGED = "ready", "stale", "damaged"
COLOURS = {READY: "green", STALE: "yellow", DAMAGED: "red"}


@dataclass(frozen=True, kw_only=True)
class Engines:
    """One folder below engines/.

    Attributes:
        name: of the folder.
        folder: what its engine.json says, None where that cannot be read.
        states: graph → READY, STALE (built from other graphs, weights or settings than the bundle
            has now) or DAMAGED (missing, or not what was written).
        damage: one line for everything that is not intact.
        again: the command that builds them.
    """

    name: str
    folder: EngineFolder | None
    states: Mapping[str, str]
    damage: tuple[str, ...]
    again: str = ""

    @property
    def stale(self) -> bool:
        return STALE in self.states.values()

    def to_json(self) -> dict[str, Any]:
        if self.folder is None:
            return {"folder": self.name, "target": None, "engines": [], "damage": self.damage}
        return {
            "folder": self.name,
            "target": dataclasses.asdict(self.folder.target),
            "stale": self.stale,
            "engines": [
                {**dataclasses.asdict(record), "state": self.states[graph]}
                for graph, record in self.folder.engines.items()
            ],
            "damage": self.damage,
        }

    def text(self) -> str:
        if self.folder is None:
            return f"engines {self.name}: {paint('cannot be read', 'red')}"
        rows = [("engine", "size", "profiles", "build time", "")]
        for graph, record in self.folder.engines.items():
            state = self.states[graph]
            size, seconds = human_bytes(record.size), f"{record.seconds:.1f} s"
            rows.append((graph, size, str(record.profiles), seconds, paint(state, COLOURS[state])))
        shown = table(rows, right=(1, 2, 3), optional=(2, 3))
        lines = [f"engines for {self.folder.target.describe()}", shown]
        if self.stale:
            lines.append(f"stale: the bundle has changed since; run {self.again}")
        return "\n".join(lines)


def read_all(bundle: Path, manifest: Manifest) -> list[Engines]:
    """Return the engines of a bundle, one entry per target, sorted by name."""
    from var_deploy.runtime.tensorrt.engine_files import ENGINE_JSON, ENGINES

    found = sorted((bundle / ENGINES).glob(f"*/{ENGINE_JSON}"))
    return [_read(bundle, manifest, path.parent) for path in found]


def _read(bundle: Path, manifest: Manifest, path: Path) -> Engines:
    from var_deploy.runtime.tensorrt.engine_files import (
        build_command,
        folder_target,
        read_engines,
    )

    try:
        folder = read_engines(bundle, folder_target(path))
        if folder.path != path:
            raise BackendError(
                f"{path} says that it was built for {folder.target.describe()}, whose folder is "
                f"{folder.path.name}; delete it, or rename it back"
            )
    except BackendError as error:
        return Engines(name=path.name, folder=None, states={}, damage=(str(error),))
    states = {graph: _state(manifest, folder, r) for graph, r in folder.engines.items()}
    damage = tuple(
        f"{path / folder.engines[graph].file} is missing or damaged; run "
        f"{build_command(bundle, folder.target, graph)}"
        for graph, state in states.items()
        if state == DAMAGED
    )
    again = build_command(bundle, folder.target)
    return Engines(name=path.name, folder=folder, states=states, damage=damage, again=again)


def _state(manifest: Manifest, folder: EngineFolder, record: EngineRecord) -> str:
    from var_deploy.runtime.tensorrt.engine_files import engine_key

    if not folder.intact(record):
        return DAMAGED
    precision, target = folder.target.precision, folder.target
    try:
        key = engine_key(manifest, record.graph, precision, record.options, target)
    except BundleError:  # exported again, without this graph
        return STALE
    return READY if key == record.key else STALE
