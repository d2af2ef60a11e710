"""What is asked of Ray Serve."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from var_deploy.config import RuntimeConfig
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.serving.settings import Settings

pytest.importorskip("ray.serve", reason="the extra ray is not installed")


@pytest.fixture
def manifest(pocket_bundle: Path) -> Manifest:
    return read_manifest(pocket_bundle)


def asked(monkeypatch: pytest.MonkeyPatch, manifest: Manifest, replicas: str) -> dict[str, Any]:
    """The options of the deployment that draws."""
    from ray import serve

    from var_deploy.cluster.devices import Device
    from var_deploy.cluster.place import BundleSource
    from var_deploy.cluster.replica import Replica
    from var_deploy.cluster.replicas import Replicas
    from var_deploy.cluster.service import Plan, application

    found, deployment = {}, serve.deployment

    def watched(kind: type, **options: Any) -> Any:
        found[kind] = options
        return deployment(kind, **options)

    monkeypatch.setattr(serve, "deployment", watched)
    nowhere = BundleSource(bundle=Path("b"), digest="d", precision="auto", version="0", node="n")
    application(
        Plan(
            manifest=manifest,
            source=nowhere,
            config=RuntimeConfig(),
            device=Device(cpus=3, gpus=1, memory=10**9, threads=None),
            replicas=Replicas.parse(replicas),
            settings=Settings(queue=7),
            name="pocket",
        )
    )
    return found[Replica]


def test_a_number_of_replicas(monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    options = asked(monkeypatch, manifest, "4")
    assert (options["num_replicas"], "autoscaling_config" in options) == (4, False)
    assert options["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 1, "memory": 10**9}
    assert options["max_queued_requests"] == 7


def test_replicas_follow_the_load(monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    options = asked(monkeypatch, manifest, "1:4")
    assert "num_replicas" not in options
    scaling = options["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.target_ongoing_requests == manifest.batch


@pytest.mark.parametrize("failures", [2, 3])
def test_proxies_that_a_busy_node_lost(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from var_deploy.cluster import service

    calls: list[Any] = []

    def start(**options: Any) -> None:
        calls.append(options["http_options"])
        if len(calls) <= failures:
            raise RayActorError(error_msg="killed before it was ready")

    monkeypatch.setattr(serve, "start", start)
    where = HTTPOptions(host="127.0.0.1", port=8123)
    with pytest.raises(RayActorError) if failures == 3 else contextlib.nullcontext():
        service._start(where, LoggingConfig())
    assert calls == [where] * 3
