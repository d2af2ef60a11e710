"""Writes a plan as a Kubernetes manifest: PersistentVolumeClaim, Deployment and Service.

Fields and quantities are those of the Kubernetes API reference, v1 and apps/v1.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from var_deploy.errors import BackendError, UsageError
from var_deploy.planning.memory import CPU_IMPORTS, TENSORRT_RUNTIME, layout_graphs, plan_bytes
from var_deploy.planning.plan import Plan

MARGIN = 4 / 3  # predicted memory is within a third of the measured one (planning.memory)
# Additional memory of `serve`, measured with pocket: 60 MB of libraries and responses, and 305 MB
# while it decodes an image of 25 million pixels, the largest that it accepts.
SERVICE = 400_000_000
GPU_CPUS = 2  # one thread generates, one answers requests
QUEUE = 64  # waiting requests, the default of `serve`
SLACK = 3  # expected time of an image over its least time
READ = 50e6  # bytes per second to hash and load a bundle from a slow disk
PERIOD = 5  # seconds between two probes
SETTLE = 5  # seconds until no requests arrive at a pod that stops
FLUSH = 10  # seconds to send the last responses
SHORTEST, LONGEST = 60, 600  # limits of the seconds to stop
USER = 65532  # of the images, deploy/Dockerfile
VIDEO = 44  # the group that a Jetson's devices belong to
PLAIN = r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[A-Za-z/][\w./:-]*|\d+[GM]i"  # needs no quotes


def manifest(plan: Plan, *, cpus: int, image: str | None = None) -> str:
    """The manifest, as YAML, that runs `serve` as planned.

    Args:
        cpus: processors of a pod without a GPU.
        image: name of the container image; None derives it from the device, as in
            docs/CONTAINERS.md.

    Raises UsageError for an invalid image name, BackendError where the model does not fit the GPU.
    """
    gpu = plan.device.sm is not None
    if gpu and plan.misfit:
        raise BackendError(plan.misfit)
    if image is None:
        kind = "cpu" if not gpu else "jetson" if plan.device.one_memory else "gpu"
        image = f"var-deploy:{kind}"
    elif not re.fullmatch(r"[A-Za-z0-9][\w.:/@-]*", image, re.ASCII):
        raise UsageError(f"--image must be like registry/var-deploy:1, found {image!r}")
    name = _name(plan.name)
    parts = (_claim(plan, name), _deployment(plan, name, image, cpus), _service(name))
    documents = ["\n".join(_yaml(part)) for part in parts]
    return _about(plan, cpus) + "\n---\n".join(documents)


def _name(model: str) -> str:
    """A valid name of a Service (RFC 1035) from a preset or folder, at most 40 characters."""
    slug = re.sub(r"[^a-z0-9]+", "-", model.rstrip("/").rpartition("/")[2].lower()).strip("-")
    return (slug if re.match("[a-z]", slug) else f"model-{slug}")[:40].strip("-")


def _about(plan: Plan, cpus: int) -> str:
    """YAML comments that explain the numbers."""
    w, peak = plan.workload, plan.peak / 1e9
    memory = f"the predicted peak of {peak:.2f} GB"
    if _is_card(plan):
        memory = (
            f"the peak of {peak:.2f} GB is the card's and must be free there; the node holds the "
            "interpreter, the libraries of CUDA and TensorRT, and an engine while it is read"
        )
    paragraphs = (
        f"{_name(plan.name)} on {plan.device.title}: batch {w.batch}, guidance "
        f"{'on' if w.guidance else 'off'}, {w.precision}, layout {plan.layout}. Written by "
        "`var-deploy plan --kubernetes`; docs/CONTAINERS.md tells what it needs.",
        f"memory: {memory}. A third more, since parts are estimates, and {SERVICE / 1e6:.0f} MB "
        "for the service. Requests are limits: weights are held all the time.",
        *(
            ()
            if plan.device.sm
            else (
                f"cpu: {cpus}, the processors of the machine that planned, less one for its node.",
            )
        ),
        f"terminationGracePeriodSeconds: a full queue of single images in {SLACK} times their "
        f"least time, {SHORTEST} to {LONGEST} s.",
    )
    lines = (line for text in paragraphs for line in textwrap.wrap(text, 96))
    return "".join(f"# {line}\n" for line in lines)


def _claim(plan: Plan, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(name),
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": f"{math.ceil(1.1 * _stored(plan) / 2**30)}Gi"}},
        },
    }


def _deployment(plan: Plan, name: str, image: str, cpus: int) -> dict[str, Any]:
    gpu = plan.device.sm is not None
    pod = {
        # otherwise a Service named var-deploy-serve would set options through the environment
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": _grace(plan),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            **({"supplementalGroups": [VIDEO]} if gpu and plan.device.one_memory else {}),
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **({"initContainers": [_engines(plan, image)]} if gpu else {}),
        "containers": [_serve(plan, image, GPU_CPUS if gpu else cpus)],
        "volumes": [
            {"name": "bundle", "persistentVolumeClaim": {"claimName": name}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        ],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(name),
        "spec": {
            "replicas": 1,
            # a second pod at the same time would need the same memory, device and claim
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": _labels(name)},
            "template": {"metadata": {"labels": _labels(name)}, "spec": pod},
        },
    }


def _serve(plan: Plan, image: str, cpus: int) -> dict[str, Any]:
    """The container that runs `serve` with the planned backend, precision and layout."""
    gpu = plan.device.sm is not None
    options = {
        "backend": "tensorrt" if gpu else "onnxruntime-cpu",
        "precision": plan.workload.precision,
        "layout": plan.layout,
        "queue": str(QUEUE),
        **({} if gpu else {"threads": str(cpus)}),  # the default is all cores of the node
        # the service's names for other pods; only the cluster can define names below these two
        "allowed_host": f"{_name(plan.name)} *.svc *.svc.cluster.local",
    }
    starts = math.ceil((SHORTEST + _stored(plan) / READ) / PERIOD)
    return {
        "name": "serve",
        "image": image,
        "args": ["serve", "/bundle"],
        "env": [{"name": f"VAR_DEPLOY_SERVE_{k.upper()}", "value": v} for k, v in options.items()],
        "ports": [{"name": "http", "containerPort": 8000}],
        "startupProbe": {**_probe("/health"), "failureThreshold": starts},
        "readinessProbe": _probe("/health"),
        # not /health, which fails while the last images are generated before a stop
        "livenessProbe": {**_probe("/metrics"), "failureThreshold": 12},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(SETTLE)]}}},
        "resources": _resources(plan, _host_memory(plan), cpus),
        "securityContext": _locked(),
        "volumeMounts": _mounts(read_only=True),
    }


def _engines(plan: Plan, image: str) -> dict[str, Any]:
    """The init container that builds the engines on the GPU; existing engines are kept."""
    build = plan.layouts[plan.layout].build
    assert build is not None
    args = ["--layout", plan.layout, "--precision", plan.workload.precision]
    memory = build.total if plan.device.one_memory else build.host
    return {
        "name": "engines",
        "image": image,
        "args": ["build", "/bundle", *args],
        "resources": _resources(plan, memory, GPU_CPUS),
        "securityContext": _locked(),
        "volumeMounts": _mounts(read_only=False),
    }


def _service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name),
        "spec": {
            "selector": _labels(name),
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "labels": _labels(name)}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "var-deploy", "app.kubernetes.io/instance": name}


def _probe(path: str) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": PERIOD,
        "timeoutSeconds": PERIOD - 1,
    }


def _locked() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _mounts(*, read_only: bool) -> list[dict[str, Any]]:
    bundle = {"name": "bundle", "mountPath": "/bundle", "readOnly": read_only}
    return [bundle, {"name": "tmp", "mountPath": "/tmp"}]


# numbers


def _is_card(plan: Plan) -> bool:
    """Whether the device is a GPU with its own memory."""
    return plan.device.sm is not None and not plan.device.one_memory


def _host_memory(plan: Plan) -> int:
    """Bytes of host memory during a generation.

    For a GPU with its own memory this is an estimate: libraries are assumed to need as much as on
    the device.
    """
    if not _is_card(plan):
        return plan.peak
    graphs = layout_graphs(plan.workload, plan.layout)
    return CPU_IMPORTS + TENSORRT_RUNTIME + max(plan_bytes(plan.workload, g) for g in graphs)


def _resources(plan: Plan, memory: int, cpus: int) -> dict[str, Any]:
    size = f"{math.ceil((MARGIN * memory + SERVICE) / 2**20)}Mi"
    gpu = {} if plan.device.sm is None else {"nvidia.com/gpu": "1"}
    asked = {"cpu": str(cpus), "memory": size, **gpu}
    return {"requests": asked, "limits": asked}


def _stored(plan: Plan) -> int:
    """Bytes on disk of the bundles and the engines."""
    return plan.stored


def _grace(plan: Plan) -> int:
    """Seconds until a pod that stops is killed."""
    drawing = SLACK * QUEUE * plan.seconds / plan.workload.batch
    return min(max(math.ceil(SETTLE + FLUSH + drawing), SHORTEST), LONGEST)


# YAML: maps, lists, words and numbers in block style


def _yaml(value: Any) -> Iterator[str]:
    """Lines of a map or a list in block style, without anchors or tags."""
    if isinstance(value, list):
        for item in value:
            first, *rest = _yaml(item) if isinstance(item, dict) else [_scalar(item)]
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
        return
    for key, item in value.items():
        if isinstance(item, dict | list):
            yield f"{_scalar(key)}:"
            yield from (f"  {line}" for line in _yaml(item))
        else:
            yield f"{_scalar(key)}: {_scalar(item)}"


def _scalar(value: str | int) -> str:
    """A YAML scalar: quoted as in JSON, unless it is a plain word in every version of YAML."""
    if isinstance(value, str) and re.fullmatch(PLAIN, value, re.ASCII | re.I):
        return value
    return json.dumps(value)
