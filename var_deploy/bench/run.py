"""Sets up and runs `bench`: which workers are compared, and the rooflines of their launches."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from var_deploy import names
from var_deploy.bench.busy import busy_processors
from var_deploy.bench.power import find_meters
from var_deploy.bench.rates import Rates
from var_deploy.bench.report import BenchReport, Result, Run, Surroundings
from var_deploy.bench.roofline import Roofline, roofline_of, rooflines
from var_deploy.bench.rounds import Comparison, Entry, Rated, Rounds
from var_deploy.bundle.graph_refs import generation_graphs
from var_deploy.config import AUTO, CPU, Precision, RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.host.installation import module_command, pip_install
from var_deploy.host.machine import Machine, check_threads
from var_deploy.manifest import Manifest, check_files, read_manifest
from var_deploy.planning.costs import graph_weights
from var_deploy.planning.devices import Device, find_device
from var_deploy.planning.text_costs import pooled_weights
from var_deploy.planning.workload import Work, workload_of
from var_deploy.progress import Progress
from var_deploy.runtime.text_features import text_encoder_folder

OURS, RATES = "var_deploy.bench.ours", "var_deploy.bench.rates"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another runtime for the same model, which `bench` compares with.

    Attributes:
        module: module of the worker program (see `worker.serve`), and its `arguments`.
        needs: the Python module that it requires; `extra`: the extra that installs it.
    """

    module: str
    arguments: tuple[str, ...]
    needs: str
    extra: str


def _torch(name: str) -> Peer:
    return Peer(
        module="var_deploy.export.baselines.torch_bench",
        arguments=("--baseline", name),
        needs="torch",
        extra="export",
    )


def _openvino(hint: str) -> Peer:
    return Peer(
        module="var_deploy.bench.openvino_peer",
        arguments=("--hint", hint),
        needs="openvino",
        extra="openvino",
    )


PEERS: Mapping[str, Peer] = {
    **{name: _torch(name) for name in ("torch", "torch-bf16", "torch-compile")},
    "openvino": _openvino("f32"),
    "openvino-bf16": _openvino("bf16"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of `bench`.

    Attributes:
        batches: numbers of images per generation; there is one run for each.
        configs: one config per worker of this project. All have the same number of threads, which
            holds for the peers too; None is one thread for each core that the process may use.
        against: names of PEERS.
        repeat: rounds that are counted; `warm_up`: rounds before them that are not.
        busy: processes of other work that run beside everything that is measured.
    """

    batches: tuple[int, ...] = (1,)
    configs: tuple[RuntimeConfig, ...] = (RuntimeConfig(),)
    against: tuple[str, ...] = ()
    repeat: int = 10
    warm_up: int = 2
    busy: int = 0

    def __post_init__(self) -> None:
        check_threads(self.threads, machine=Machine())

    @property
    def threads(self) -> int | None:
        return self.configs[0].threads

    def to_json(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "precisions": tuple(dict.fromkeys(config.precision for config in self.configs)),
            "layouts": tuple(dict.fromkeys(config.layout for config in self.configs)),
            "backend": self.configs[0].backend,
            "against": self.against,
            "threads": self.threads,
            "repeat": self.repeat,
            "warm_up": self.warm_up,
            "busy": self.busy,
        }


def bench(
    bundle: Path,
    settings: Settings,
    *,
    machine: Machine | None = None,
    progress: Progress = lambda message, fraction: None,
) -> BenchReport:
    """Run all comparisons and return the report.

    A worker that fails is listed in the report with its problem. Raises BundleError for a damaged
    bundle, or one that lacks a precision.
    """
    machine = machine or Machine()
    manifest = read_manifest(bundle)
    for config in settings.configs:
        if config.precision != AUTO:
            manifest.graph(config.precision, names.DECODER)
    progress("reading the bundle", 0.0)
    check_files(bundle, manifest)  # also reads it into the page cache, for all workers
    surroundings, meters, runs = Surroundings.of(machine), find_meters(machine), []
    for number, images in enumerate(settings.batches):
        rounds = Rounds(
            images=images, warm_up=settings.warm_up, repeat=settings.repeat, meters=meters
        )
        comparison = Comparison(
            entries(bundle, settings, images, machine, manifest),
            module_command(RATES, "--threads", settings.threads or 0),
            rounds,
            partial(_part, progress, settings.batches, number),
        )
        with busy_processors(settings.busy):
            comparison.run()
        runs.append(evaluate(comparison, manifest, images, machine))
    return BenchReport(
        name=bundle.absolute().name,
        manifest=manifest,
        surroundings=surroundings,
        settings=settings.to_json(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        runs=runs,
    )


def _part(
    progress: Progress, batches: Sequence[int], number: int, message: str, fraction: float
) -> None:
    """Report the progress of one run as a part of all runs."""
    prefix = f"{batches[number]} a generation, " if len(batches) > 1 else ""
    progress(prefix + message, (number + fraction) / len(batches))


def entries(
    bundle: Path,
    settings: Settings,
    images: int,
    machine: Machine,
    manifest: Manifest | None = None,
) -> list[Entry]:
    """The workers to run: those of this project first, then the peers in the given order.

    Where the `manifest` of the bundle names a text encoder that is there, a worker measures it in
    each precision.
    """
    found, encoders = [], []
    given = manifest is not None and text_encoder_folder(bundle, manifest) is not None
    options = (bundle, "--batch", images, "--threads", settings.threads or 0)
    for config in settings.configs:
        chosen = ("--precision", config.precision, "--backend", config.backend)
        layout = () if config.layout == AUTO else ("--layout", config.layout)
        command = module_command(OURS, *options, *chosen, *layout)
        told = [part for part in (config.precision, config.layout) if part != AUTO]
        found.append(Entry(name=" ".join(["var-deploy", *told]), ours=True, command=command))
        if given:
            command = module_command(OURS, *options, *chosen, "--text-encoder")
            name = " ".join(["text encoder", *told[: config.precision != AUTO]])
            encoders.append(Entry(name=name, ours=True, command=command))
    found += {entry.name: entry for entry in encoders}.values()  # one for several layouts
    for name in settings.against:
        peer = PEERS[name]
        if machine.has_module(peer.needs):
            command = module_command(peer.module, *options, *peer.arguments)
            found.append(Entry(name=name, ours=False, command=command))
        else:
            problem = f"{peer.needs} is not installed; run {pip_install(peer.extra, peer.needs)}"
            found.append(Entry(name=name, ours=False, problem=problem))
    return found


# rates and rooflines


def evaluate(comparison: Comparison, manifest: Manifest, images: int, machine: Machine) -> Run:
    """The result of a comparison, with rates, and rooflines for this project's workers."""
    rated = comparison.rated
    found = None
    if rated.samples and rated.about is not None:
        found = Rates.of(rated.samples, rated.about.threads)
    for result in comparison.results:
        if not result.ran:
            continue
        precision = result.about.graphs if result.about else ""
        work = result.about.work if result.about else {}
        if work:
            result.weights = work["weights"]
        elif precision in manifest.graphs:
            result.weights = weights_used(manifest, precision)
        if result.ours:
            try:
                device = _device(result, found, rated, machine)
            except UsageError as error:
                result.roofline_problem = str(error)
                continue
            if work:
                result.rooflines = [_roofline_of_work(work, device, precision)]
            else:
                result.rooflines = generation_rooflines(manifest, precision, images, device)
    return Run(
        images=images, results=comparison.results, rates=found, rates_problem=rated.problem
    )


def weights_used(manifest: Manifest, precision: str) -> int:
    """Bytes of the weights of one generation, each counted once.

    The static graphs of all scales together have the same weights as `step`, and the two condition
    graphs of a text-to-image model share those of the pool.
    """
    graphs, form = manifest.graphs[precision], cast(Precision, precision)
    workload = workload_of(manifest, form)
    wanted = generation_graphs(manifest.model, "shared", form, guidance=manifest.guidance)
    total = sum(
        graphs[ref.name].weight_bytes
        if ref.name in graphs
        else graph_weights(workload, ref.name).nbytes(workload.itemsize)
        for ref in wanted
    )
    if any(ref.kind == "unconditional" for ref in wanted):
        total -= pooled_weights(workload).nbytes(workload.itemsize)
    return total


def generation_rooflines(
    manifest: Manifest, precision: str, images: int, device: Device
) -> list[Roofline]:
    """Least time of each launch of a generation of `images` images, summed over its batches."""
    batches = -(-images // manifest.of(precision).batch)
    once = rooflines(workload_of(manifest, cast(Precision, precision)), device)
    return [
        dataclasses.replace(
            roofline,
            traffic=batches * roofline.traffic,
            operations=batches * roofline.operations,
            moving=batches * roofline.moving,
            computing=batches * roofline.computing,
        )
        for roofline in once
    ]


def _roofline_of_work(work: Mapping[str, int], device: Device, precision: str) -> Roofline:
    """The least time of a worker that runs other graphs than those of a generation."""
    counted = Work(
        name="all",
        compute_operations=work["compute"],
        full_operations=work["full"],
        traffic=work["weights"],
    )
    return roofline_of(counted, device, cast(Precision, precision))


def _device(result: Result, found: Rates | None, rated: Rated, machine: Machine) -> Device:
    """The device of a worker: a CPU with measured rates, a GPU with published ones.

    Raises UsageError where the rates are not known.
    """
    if result.about is None or result.about.backend != CPU:
        return find_device("this", machine)
    if found is None:
        raise UsageError(f"the rates of this machine could not be measured: {rated.problem}")
    return measured_device(found)


def measured_device(found: Rates) -> Device:
    """A `Device` with the measured rates of this machine; int8 products have their own rate."""
    return Device(
        name="measured",
        title="this machine, as measured",
        memory=0,
        reserved=0,
        bandwidth=found.bandwidth,
        compute_rate=found.gemm["int8"],
        full_rate=found.gemm["fp32"],
        sm=None,
        one_memory=True,
        source="measured in the same run",
    )
