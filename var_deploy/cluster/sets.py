"""Generates an image set on a Ray cluster: one worker (actor) per device, and the driver writes.

Ray places workers where a device and memory are free, and the next missing shard goes to a free
worker. A shard returns through the object store and is written by the driver, so nodes need no
shared folder, and the set is written exactly as with one process.
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
from var_deploy.cluster.place import bundle_source, cause_of, text_encoder_of
from var_deploy.cluster.worker import ShardResult, Worker
from var_deploy.config import Loaded, RuntimeConfig
from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.spec import SetSpec
from var_deploy.datasets.work import SetProgress, listing
from var_deploy.errors import VarDeployError, one_line
from var_deploy.manifest import read_manifest
from var_deploy.progress import Progress

# lost workers with one shard, or while loading, after which a run ends; those whose node is gone do
# not count, since that says nothing about the work
LOSSES = 3
NODE_DIED = "its node has died"  # in Ray's message; no attribute of its errors says so
LOOK = 2.0  # seconds between two checks of the cluster's resources
PATIENCE = 60.0  # seconds without any device, as when a node restarts
LOST = (RayActorError, ObjectLostError)
KEPT = "whole shards are kept: the same command makes the rest"


@dataclass(kw_only=True)
class ClusterRun:
    """Result and statistics of a run.

    Attributes:
        how: `Pipeline.describe` of the first worker that was ready, None before.
        shards: numbers of the shards that were made.
        workers: most workers at one time; lost: workers that ended unexpectedly.
        drawing, waiting: seconds that all workers spent on shards, and between two shards.
        receiving, writing: seconds that the driver spent on receiving and writing shards.
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
    text_encoder: Path | None = None,
) -> ClusterRun:
    """Generate the missing ones of `shards` on the connected cluster.

    The first worker that is ready resolves "auto" in `spec`; then the set's folder is begun. At the
    end, also after an error, set.json lists the shards in the folder, and all workers are ended.

    Args:
        config: how a worker runs the bundle, except what the set decides; one thread by default.
        workers: most workers at one time; None uses every device.
        text_encoder: folder of the text encoder of a set of prompts; None looks in the bundle and
            beside it.

    Raises UsageError where no node can hold a worker, exceptions of workers and of
    `SetFolder.write`, and VarDeployError where workers are lost again and again.
    """
    manifest, wanted = read_manifest(bundle), spec.config(config)
    text = text_encoder_of(bundle, manifest, text_encoder)
    device = device_of(manifest, wanted, images=spec.shard_size, text_encoder=text)
    if not places(device):
        raise device.too_large()
    hire = functools.partial(
        ray.remote(**device.options)(Worker).remote,
        bundle_source(
            bundle,
            spec.precision,
            text_encoder=text_encoder,
            text_config=spec.text_config(config),
        ),
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
    """An actor with its pending calls in order: loading the bundle (None), then shards.

    `spec` is a reference to the set's settings in the object store.
    """

    def __init__(self, actor: Any, spec: Any) -> None:
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
        self.made = ClusterRun(spec=spec)
        self._spec = ray.put(spec)  # once per node, since there may be many prompts
        self._folder, self._tell = folder, tell
        self._shards = shards
        self._device, self._new_actor, self._most = device, hire, most
        self._workers: list[_Worker] = []
        # The calls that have not come back, each with its shard (None: loading). The results of two
        # calls of one worker may be seen in either order, so their order does not tell the shard.
        self._pending: dict[Any, tuple[_Worker, int | None]] = {}
        self._todo: deque[int] = deque(folder.missing(spec, shards))
        self._losses: Counter[int | None] = Counter()  # None: while a bundle was loaded
        self._looked = self._placed = float("-inf")

    def begin(self) -> SetSpec:
        """Wait for the first worker, and begin the set with its settings, which are returned."""
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
        """Start workers where there is room, and process finished calls."""
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
        """Start workers for free devices; those without room yet are queued by Ray."""
        self._looked = time.monotonic()
        room = places(self._device)
        if room or self._workers:
            self._placed = self._looked
        elif self._looked - self._placed > PATIENCE:
            raise VarDeployError(f"the cluster has no worker left; {KEPT}")
        wanted = min(room, self._most or room, max(len(self._todo), 1))
        for _ in range(len(self._workers), wanted):
            worker = _Worker(self._new_actor(), self._spec)
            self._workers.append(worker)
            self._pending[worker.loading] = worker, None

    def _hand_out(self) -> None:
        """Give a shard to each worker without one; then, while enough shards are left, a second
        one, so that workers do not wait for the driver."""
        ready = [worker for worker in self._workers if worker.ready]
        for held in (0, 1):
            for worker in ready:
                enough = len(self._todo) > (len(ready) if held else 0)
                if len(worker.calls) == held and enough:
                    shard = self._todo.popleft()
                    if self._folder.has(self.made.spec, shard):  # another process made it
                        self._tally.skip(shard)
                        continue
                    call = worker.actor.draw.remote(self._spec, shard)
                    worker.calls.append(shard)
                    self._pending[call] = worker, shard

    def _take(self, call: Any) -> None:
        """Process the result of a call, or the loss of its worker."""
        if call not in self._pending:  # its worker was lost with another call
            return
        worker, shard = self._pending.pop(call)
        started = time.monotonic()
        try:
            result = ray.get(call)
        except LOST as error:
            self._lose(worker, error)
            return
        except RayTaskError as error:
            raise _raised(error) from None
        worker.calls.remove(shard)
        if shard is None:
            self._welcome(worker, cast(Loaded, result))
        else:
            self._keep(shard, cast(ShardResult, result), time.monotonic() - started)

    def _welcome(self, worker: _Worker, how: Loaded) -> None:
        worker.ready = True
        self._losses[None] = 0
        made = self.made
        made.workers = max(made.workers, sum(worker.ready for worker in self._workers))
        if made.how is None:
            made.how = how
            made.spec = made.spec.decided_by(how)
            self._spec = ray.put(made.spec)

    def _keep(self, shard: int, drawn: ShardResult, receiving: float) -> None:
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
        """Requeue the shards of a lost worker. It was working on the first of them."""
        self._workers.remove(worker)
        self._pending = {
            call: (w, shard) for call, (w, shard) in self._pending.items() if w is not worker
        }
        ray.kill(worker.actor)  # it may only be unreachable
        self._todo.extendleft(shard for shard in reversed(worker.calls) if shard is not None)
        at = worker.calls[0]
        self.made.lost += 1
        self._looked = float("-inf")  # look for a replacement at once
        if _went_with_its_node(error):
            return
        self._losses[at] += 1
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


def _went_with_its_node(error: Exception) -> bool:
    """Whether a worker was lost because its node left the cluster."""
    return NODE_DIED in str(error) or bool(getattr(error, "preempted", False))


def _cause(error: Exception) -> str:
    """The first sentences of Ray's message, which can be a page long."""
    text = one_line(error)
    if "No module named 'var_deploy" in text:
        return "var-deploy is not installed on their nodes"
    return text if len(text) < 300 else f"{text[:300]} …"
