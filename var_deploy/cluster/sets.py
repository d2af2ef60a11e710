"""An image set on a Ray cluster: an actor a device draws, the driver writes.

Nothing is scheduled here: Ray places actors where their device and memory are free, and the next
missing shard goes to whoever is free. A shard comes back through the object store and is written by
the driver, so nodes share no folder and the set appears exactly as with one process.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from var_deploy.cluster.devices import Device, device_of, places
from var_deploy.cluster.place import cause_of, offer
from var_deploy.cluster.worker import Drawn, Worker
from var_deploy.config import Loaded, RuntimeConfig
from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.spec import SetSpec
from var_deploy.datasets.work import SetProgress, listing
from var_deploy.errors import VarDeployError, one_line
from var_deploy.manifest import read_manifest
from var_deploy.progress import Progress

LOSSES = 3  # of workers over one shard, or over loading the bundle, that end a run
LOOK = 2.0  # seconds between two looks at what the cluster has
PATIENCE = 60.0  # seconds without any device, as where a node is started anew
LOST = (RayActorError, ObjectLostError)
KEPT = "whole shards are kept: the same command makes the rest"


@dataclass(kw_only=True)
class Made:
    """What a run did.

    Attributes:
        how: `Pipeline.describe` of the first worker that was ready, None while none is.
        shards: those that were made.
        workers: the most that drew at one time; lost: those that ended too early.
        drawing, waiting: seconds of all workers with a shard, and between two.
        receiving, writing: seconds of the driver with their results.
    """

    spec: SetSpec
    how: Loaded | None = None
    shards: list[int] = field(default_factory=list)
    workers: int = 0
    lost: int = 0
    drawing: float = 0.0
    waiting: float = 0.0
    receiving: float = 0.0
    writing: float = 0.0

    def to_json(self) -> dict[str, Any]:
        data = {"workers": self.workers, "lost": self.lost}
        times = ("drawing", "waiting", "receiving", "writing")
        return {**data, **{f"{name}_seconds": round(getattr(self, name), 3) for name in times}}


def make_missing(
    bundle: Path,
    folder: SetFolder,
    spec: SetSpec,
    shards: Sequence[int],
    tell: Progress,
    *,
    config: RuntimeConfig,
    workers: int | None = None,
) -> Made:
    """Draw those of `shards` that are not in the folder on the cluster that is connected.

    What is "auto" in `spec` is decided by the first worker that is ready, and the set is begun
    then. However this ends, set.json lists what is there, and the workers are ended.

    Args:
        config: how a worker runs the bundle, but for what the set decides; threads that are left
            open are one.
        workers: the most at one time; None takes every device.

    Raises UsageError where no node can hold a worker, what a worker raised or
    `SetFolder.write`, and VarDeployError where workers are lost again and again.
    """
    device = device_of(read_manifest(bundle), spec.config(config), images=spec.shard_size)
    if not places(device):
        raise device.too_large()
    hire = functools.partial(
        ray.remote(**device.options)(Worker).remote,
        offer(bundle, spec.precision),
        dataclasses.replace(config, threads=device.threads),
        device.cpus,
    )
    run = _Run(folder, spec, shards, tell, device, hire, workers)
    try:
        with listing(folder, run.begin()):
            run.work()
    finally:
        run.dismiss()
    run.made.shards.sort()
    return run.made


class _Worker:
    """An actor, and its calls in order: the bundle at first (None), then shards."""

    def __init__(self, actor: Any, spec: SetSpec) -> None:
        self.actor = actor
        self.calls: deque[int | None] = deque([None])
        self.ready = False
        self.loading = self.actor.load.remote(spec)


class _Run:
    def __init__(
        self,
        folder: SetFolder,
        spec: SetSpec,
        shards: Sequence[int],
        tell: Progress,
        device: Device,
        hire: Callable[[], Any],
        most: int | None,
    ) -> None:
        self.made = Made(spec=spec)
        self._folder, self._tell = folder, tell
        self._shards = shards
        self._device, self._new_actor, self._most = device, hire, most
        self._workers: list[_Worker] = []
        self._pending: dict[Any, _Worker] = {}  # the calls that have not come back
        self._todo: deque[int] = deque(folder.missing(spec, shards))
        self._losses: Counter[int | None] = Counter()  # None: while a bundle was loaded
        self._looked = self._placed = float("-inf")

    def begin(self) -> SetSpec:
        """Wait for the first worker, and begin the set as it draws. Returns the settings."""
        while self.made.how is None:
            self._step()
        self._folder.begin(self.made.spec)
        return self.made.spec

    def work(self) -> None:
        spec = self.made.spec
        self._todo = deque(self._folder.missing(spec, self._shards))
        self._tally = SetProgress(spec, self._shards, self._todo, self._tell)
        while self._todo or any(call is not None for w in self._workers for call in w.calls):
            self._hand_out()
            self._step()

    def dismiss(self) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)

    def _step(self) -> None:
        """Hire, and take what has come back."""
        if time.monotonic() - self._looked > LOOK:
            self._hire()
        if not any(worker.ready for worker in self._workers):
            self._tell("waiting for a worker", 0.0)
        if self._pending:
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=LOOK)
            for call in done:
                self._take(call)
        else:
            time.sleep(LOOK)  # no device is there

    def _hire(self) -> None:
        """Workers for the devices that have none; those that Ray has no room for yet wait."""
        self._looked = time.monotonic()
        room = places(self._device)
        if room or self._workers:
            self._placed = self._looked
        elif self._looked - self._placed > PATIENCE:
            raise VarDeployError(f"the cluster has no worker left; {KEPT}")
        wanted = min(room, self._most or room, max(len(self._todo), 1))
        for _ in range(len(self._workers), wanted):
            worker = _Worker(self._new_actor(), self.made.spec)
            self._workers.append(worker)
            self._pending[worker.loading] = worker

    def _hand_out(self) -> None:
        """A shard to everyone who has none; then, while there are more than workers, a second
        one, so that nobody waits for the driver."""
        ready = [worker for worker in self._workers if worker.ready]
        for held in (0, 1):
            for worker in ready:
                enough = len(self._todo) > (len(ready) if held else 0)
                if len(worker.calls) == held and enough:
                    shard = self._todo.popleft()
                    if self._folder.has(self.made.spec, shard):  # somebody else made it
                        self._tally.skip(shard)
                        continue
                    call = worker.actor.draw.remote(self.made.spec, shard)
                    worker.calls.append(shard)
                    self._pending[call] = worker

    def _take(self, call: Any) -> None:
        """What a call has given, or that its worker is lost."""
        if call not in self._pending:  # of a worker that another call has shown to be lost
            return
        worker = self._pending.pop(call)
        started = time.monotonic()
        try:
            result = ray.get(call)
        except LOST as error:
            self._lose(worker, error)
            return
        except RayTaskError as error:
            raise _raised(error) from None
        shard = worker.calls.popleft()
        if shard is None:
            self._welcome(worker, cast(Loaded, result))
        else:
            self._keep(shard, cast(Drawn, result), time.monotonic() - started)

    def _welcome(self, worker: _Worker, how: Loaded) -> None:
        worker.ready = True
        self._losses[None] = 0
        made = self.made
        made.workers = max(made.workers, sum(worker.ready for worker in self._workers))
        if made.how is None:
            made.how = how
            made.spec = made.spec.decided_by(how)

    def _keep(self, shard: int, drawn: Drawn, receiving: float) -> None:
        made, started = self.made, time.monotonic()
        if not self._folder.has(made.spec, shard):
            self._folder.write(made.spec, shard, drawn.data)
            made.shards.append(shard)
        made.writing += time.monotonic() - started
        made.receiving += receiving
        made.drawing += drawn.drawing
        made.waiting += drawn.waiting
        self._tally.add(shard)
        self._tally.report()

    def _lose(self, worker: _Worker, error: Exception) -> None:
        """Put the shards of a worker back. The first of them is what it was at."""
        self._workers.remove(worker)
        self._pending = {call: w for call, w in self._pending.items() if w is not worker}
        ray.kill(worker.actor)  # where it is only out of reach
        self._todo.extendleft(shard for shard in reversed(worker.calls) if shard is not None)
        at = worker.calls[0]
        self._losses[at] += 1
        self.made.lost += 1
        self._looked = float("-inf")  # somebody else is to take its place
        if self._losses[at] < LOSSES or (at is None and any(w.ready for w in self._workers)):
            return
        what = "while they loaded the bundle" if at is None else f"over shard {at}"
        raise VarDeployError(f"{LOSSES} workers ended {what} ({_cause(error)}); {KEPT}")


def _raised(error: RayTaskError) -> BaseException:
    cause = cause_of(error)
    if isinstance(cause, ModuleNotFoundError):
        return VarDeployError(
            f"a node of the cluster lacks {cause.name}: install var-deploy there with the extras "
            "that it has here"
        )
    return cause


def _cause(error: Exception) -> str:
    """The first sentences of what Ray says, which goes on for a page."""
    text = one_line(error)
    if "No module named 'var_deploy" in text:
        return "var-deploy is not installed on their nodes"
    return text if len(text) < 300 else f"{text[:300]} …"
