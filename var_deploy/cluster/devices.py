"""The resources that a worker needs of a node, and how many workers fit on a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import ray

from var_deploy.config import Layout, Precision, RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest
from var_deploy.planning.memory import Library, footprint
from var_deploy.planning.selection import Facts, select
from var_deploy.planning.text_memory import text_encoder_memory, text_encoder_precision
from var_deploy.planning.workload import workload_of
from var_deploy.text.manifest import TextEncoderManifest

WORKER = 100_000_000  # bytes that Ray takes in a worker process, measured


@dataclass(frozen=True, kw_only=True)
class Device:
    """The resources of a worker, in Ray's units.

    Attributes:
        cpus, gpus: numbers of CPUs and GPUs.
        memory: bytes of the node's memory.
        threads: threads of its pipeline; None on a GPU.
    """

    cpus: int
    gpus: int
    memory: int
    threads: int | None

    @property
    def options(self) -> dict[str, Any]:
        """Options for `ray.remote`. Ray restarts neither a lost actor nor its call: the driver
        decides about both."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "memory": self.memory,
            "max_restarts": 0,
            "max_task_retries": 0,
        }

    def too_large(self) -> UsageError:
        """The error for a cluster without a node that can hold the worker."""
        parts = [f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"]
        parts += [f"{self.gpus} GPU"] if self.gpus else []
        return UsageError(
            f"no node of the cluster has {', '.join(parts)} and {self.memory / 1e9:.2f} GB of "
            "memory for a worker; start a larger one, or ask for fewer --threads"
        )


def device_of(
    manifest: Manifest,
    config: RuntimeConfig,
    *,
    images: int,
    text_encoder: TextEncoderManifest | None = None,
) -> Device:
    """The resources of a worker that runs a bundle, and its text encoder, with `config`.

    A worker takes a GPU where the backend runs on one, or is "auto" and the cluster has GPUs; else
    it takes one CPU of the cluster per thread. Memory is the peak that `plan` predicts, of the text
    encoder too, plus `images` images and Ray's share. The same amount is taken on the host of a
    GPU, which holds an engine only while it is loaded.

    Raises what `select` raises.
    """
    gpu = cast(Any, ray).cluster_resources().get("GPU", 0) >= 1
    selection = select(config, manifest, Facts(cuda=gpu, cores=1))
    chosen, on_gpu = selection.config, selection.on_gpu
    library: Library = "tensorrt" if on_gpu else "onnxruntime-cpu"
    precision = cast(Precision, chosen.precision)
    peak = footprint(workload_of(manifest, precision), cast(Layout, chosen.layout), library).peak
    if text_encoder is not None:
        held_in = text_encoder_precision(text_encoder.graphs, precision, gpu=False)
        peak += text_encoder_memory(text_encoder.model, held_in, gpu=False).peak
    tokenizer = manifest.model.tokenizer
    held = images * math.prod(tokenizer.image_size) * tokenizer.image_channels
    return Device(
        cpus=chosen.threads or 1,
        gpus=int(on_gpu),
        memory=peak + held + WORKER,
        threads=chosen.threads,
    )


def places(device: Device) -> int:
    """Number of workers that fit on all live nodes, if nothing else ran there."""
    needs = {"CPU": device.cpus, "GPU": device.gpus, "memory": device.memory}
    return sum(
        min(int(node["Resources"].get(name, 0)) // need for name, need in needs.items() if need)
        for node in cast(Any, ray).nodes()
        if node["Alive"]
    )
