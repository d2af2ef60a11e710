"""What an actor needs of a node, and how many of them a cluster has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import ray

from var_deploy.config import Layout, Precision, RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest
from var_deploy.planning.costs import workload_of
from var_deploy.planning.memory import Library, footprint
from var_deploy.planning.selection import Facts, select

WORKER = 100_000_000  # bytes of Ray itself in a worker process, measured


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a worker occupies, as Ray counts it.

    Attributes:
        cpus, gpus: how many of each.
        memory: bytes of the node's.
        threads: what its pipeline is told; None on a GPU.
    """

    cpus: int
    gpus: int
    memory: int
    threads: int | None

    @property
    def options(self) -> dict[str, Any]:
        """For `ray.remote`. An actor that is lost stays lost, and so does its call: who hands out
        the work decides what becomes of both."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "memory": self.memory,
            "max_restarts": 0,
            "max_task_retries": 0,
        }

    def too_large(self) -> UsageError:
        parts = [f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"]
        parts += [f"{self.gpus} GPU"] if self.gpus else []
        return UsageError(
            f"no node of the cluster has {', '.join(parts)} and {self.memory / 1e9:.2f} GB of "
            "memory for a worker; start a larger one, or ask for fewer --threads"
        )


def device_of(manifest: Manifest, config: RuntimeConfig, *, images: int) -> Device:
    """A GPU where the backend is one, or is open and the cluster has GPUs; else CPU threads.

    Memory is the peak that `plan` gives, with `images` that are held and the worker itself. On a
    GPU it is the same of the host, which holds an engine no longer than it takes to load it.

    Raises what `select` raises. A worker has as many threads as it has CPUs of the cluster.
    """
    gpu = cast(Any, ray).cluster_resources().get("GPU", 0) >= 1
    selection = select(config, manifest, Facts(cuda=gpu, cores=1))
    chosen, on_gpu = selection.config, selection.on_gpu
    library: Library = "tensorrt" if on_gpu else "onnxruntime-cpu"
    workload = workload_of(manifest, cast(Precision, chosen.precision))
    tokenizer = manifest.model.tokenizer
    held = images * tokenizer.image_side**2 * tokenizer.image_channels
    return Device(
        cpus=chosen.threads or 1,
        gpus=int(on_gpu),
        memory=footprint(workload, cast(Layout, chosen.layout), library).peak + held + WORKER,
        threads=chosen.threads,
    )


def places(device: Device) -> int:
    """How many workers the nodes that are alive could hold, whatever else runs there."""
    needs = {"CPU": device.cpus, "GPU": device.gpus, "memory": device.memory}
    return sum(
        min(int(node["Resources"].get(name, 0)) // need for name, need in needs.items() if need)
        for node in cast(Any, ray).nodes()
        if node["Alive"]
    )
