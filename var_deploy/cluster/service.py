"""The HTTP service on Ray Serve: one ingress answers requests, replicas generate the images.

proxies ──► Ingress: `create_app` with a `RayBackend` ──► Replica, Replica, …
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import queue
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from var_deploy.cluster.backend import RayBackend
from var_deploy.cluster.devices import Device, device_of, places
from var_deploy.cluster.place import BundleSource, bundle_source, text_encoder_of
from var_deploy.cluster.replica import Replica
from var_deploy.cluster.replicas import Replicas
from var_deploy.config import RuntimeConfig
from var_deploy.errors import BackendError, UsageError, one_line
from var_deploy.manifest import Manifest
from var_deploy.serving.app import create_app
from var_deploy.serving.metrics import Metrics
from var_deploy.serving.server import url_of
from var_deploy.serving.settings import Settings

NAME = "var-deploy"  # of the application
ANSWERS = 10_000  # requests that the ingress handles at a time: most of them wait
AHEAD = 2  # batches that a replica accepts: one runs, one is next
BACKOFF = 0.01  # seconds after which Ray tries full replicas again
STARTS = 3  # attempts to start Ray Serve
PATIENCE = 60.0  # seconds in which new proxies must know the service
SOON = 5.0  # seconds in which proxies that ran before must know the service
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is deployed: bundle, settings and resources.

    Attributes:
        device: resources of a replica.
        name: name of the model where it is not a preset.
    """

    manifest: Manifest
    source: BundleSource
    config: RuntimeConfig
    device: Device
    replicas: Replicas
    settings: Settings
    name: str


def plan_for(
    bundle: Path,
    manifest: Manifest,
    replicas: Replicas,
    settings: Settings,
    config: RuntimeConfig,
    text_encoder: Path | None = None,
) -> Plan:
    """Plan the deployment of a bundle on the connected cluster.

    Raises what `bundle_source` raises.
    """
    text = text_encoder_of(bundle, manifest, text_encoder)
    device = device_of(manifest, config, images=manifest.batch, text_encoder=text)
    return Plan(
        manifest=manifest,
        source=bundle_source(bundle, config.precision, text_encoder=text_encoder),
        config=dataclasses.replace(config, threads=device.threads),
        device=device,
        replicas=replicas,
        settings=settings,
        name=bundle.resolve().name,
    )


@serve.ingress()
class Ingress:
    """The deployment that answers HTTP requests. There is one, since it counts the queue."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, replica: DeploymentHandle[Any], manifest: Manifest, settings: Settings, name: str
    ) -> None:
        self._settings, self._name, self._metrics = settings, name, Metrics()
        how = await replica.describe.remote()
        self._backend = RayBackend(replica, manifest, how, self._metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend, self._settings, name=self._name, metrics=self._metrics)

    async def stop(self) -> None:
        """Refuse new requests and wait for the accepted ones."""
        await self._backend.stop()

    def abort(self) -> None:
        """Drop all requests."""
        self._backend.abort()


def application(plan: Plan) -> Any:
    """The Ray Serve application: an `Ingress` bound to `Replica`s."""
    batch, replicas = plan.manifest.batch, plan.replicas
    shared: dict[str, Any] = {"graceful_shutdown_wait_loop_s": 0.1, "health_check_period_s": 2}
    how_many: dict[str, Any] = {"num_replicas": replicas.most}
    if replicas.least != replicas.most:
        scaling = AutoscalingConfig(
            min_replicas=replicas.least,
            max_replicas=replicas.most,
            target_ongoing_requests=batch,
        )
        how_many = {"autoscaling_config": scaling}
    deployment: Any = serve.deployment  # typed as a decorator only
    replica = deployment(
        Replica,
        ray_actor_options={
            name: plan.device.options[name] for name in ("num_cpus", "num_gpus", "memory")
        },
        max_ongoing_requests=AHEAD * batch,
        max_queued_requests=plan.settings.queue,
        request_router_config={"initial_backoff_s": BACKOFF, "max_backoff_s": BACKOFF},
        max_constructor_retry_count=1,
        **how_many,
        **shared,
    ).bind(plan.source, plan.config, plan.device.cpus)
    ingress = deployment(
        Ingress,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=ANSWERS,
        **shared,
    )
    return ingress.bind(replica, plan.manifest, plan.settings, plan.name)


@contextlib.contextmanager
def deployed(plan: Plan, host: str, port: int, *, alone: bool) -> Iterator[DeploymentHandle[Any]]:
    """Run the service on the connected cluster until the block ends; yields the `Ingress` handle.

    Other applications on the cluster are not changed. `alone` says that the cluster ends right
    after the block, so that the service need not be removed.

    Raises UsageError where the cluster is too small, runs such a service already, or listens at
    another address, and BackendError where the service cannot be started.
    """
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    for number in SIGNALS:  # Ray has installed handlers of its own
        signal.signal(number, signal.default_int_handler)
    room = places(plan.device)
    if not room:
        raise plan.device.too_large()
    if room < plan.replicas.least:
        raise UsageError(
            f"the cluster has room for {room} replicas of {plan.device.cpus} CPUs and "
            f"{plan.device.gpus} GPUs, found --replicas {plan.replicas.least}; ask for fewer, or "
            "for fewer --threads"
        )
    before = serve.status()
    if NAME in before.applications:
        raise UsageError(
            f"the cluster runs a service {NAME} already; stop it first, or use another cluster"
        )
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        try:
            _start(HTTPOptions(host=host, port=port), quiet)
            handle = serve.run(application(plan), name=NAME, route_prefix="/", logging_config=quiet)
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            raise BackendError(f"Ray Serve cannot start the service: {_reason(error)}") from None
        _check_answers(plan, host, port, SOON if before.proxies else PATIENCE)
        yield handle
    finally:
        if not alone:
            _remove(whole=not before.proxies)


def _start(options: HTTPOptions, logs: LoggingConfig) -> None:
    """Start Ray Serve, with several attempts.

    On a busy node Ray Serve ends proxies that start too slowly, and starts others.
    """
    for left in reversed(range(STARTS)):
        try:
            serve.start(http_options=options, logging_config=logs)
            return
        except RayActorError:
            if not left:
                raise


def _reason(error: Exception) -> str:
    """The error of a replica: the last line of the traceback in Ray's message."""
    service = serve.status().applications.get(NAME)
    messages = [one.message for one in service.deployments.values()] if service else []
    lines = [line.strip() for text in [str(error), *messages] for line in text.splitlines()]
    said = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b.*: ", line)]
    return said[-1].partition(": ")[2] if said else one_line(error)


def _check_answers(plan: Plan, host: str, port: int, patience: float) -> None:
    """Raise UsageError where the service does not answer on a node that has a proxy."""
    wildcards = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    node = next(iter(serve.status().proxies))
    there: Any = NodeAffinitySchedulingStrategy(node, soft=False)
    ask = ray.remote(num_cpus=0, scheduling_strategy=there)(answers)
    where = url_of(wildcards.get(host, host), port)
    if not ray.get(ask.remote(where, plan.manifest.digest(), patience)):
        raise UsageError(
            f"Ray Serve does not answer at {where}: it listens where it was first started; give "
            "its --host and --port"
        )


def answers(where: str, digest: str, patience: float) -> bool:
    """Whether the service of the bundle with `digest` answers within `patience` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{where}/v1/model", timeout=patience) as reply:
                return bool(json.load(reply).get("digest") == digest)
        except (OSError, ValueError):
            time.sleep(0.05)
    return False


def _remove(*, whole: bool) -> None:
    """Remove the application; with `whole` also Ray Serve, if no other application uses it."""
    with contextlib.suppress(RayError, RayServeException, RuntimeError, TimeoutError):
        if NAME in serve.status().applications:
            serve.delete(NAME)
        if whole and not serve.status().applications:
            serve.shutdown()  # type: ignore[no-untyped-call]


def until_stopped(handle: DeploymentHandle[Any]) -> None:
    """Wait for a signal, then for the accepted requests.

    A second signal drops the requests, a third returns at once.
    """
    told: queue.SimpleQueue[bool] = queue.SimpleQueue()  # whether it is a signal
    for number in SIGNALS:
        signal.signal(number, lambda *_: told.put(True))
    told.get()
    threading.Thread(target=_finish, args=(handle, told), daemon=True).start()
    if told.get():
        handle.abort.remote()
        told.get()


def _finish(handle: DeploymentHandle[Any], told: queue.SimpleQueue[bool]) -> None:
    with contextlib.suppress(RayError, RayServeException):  # the service is gone already
        handle.stop.remote().result()
    told.put(False)
