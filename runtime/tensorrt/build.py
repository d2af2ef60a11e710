"""Builds the engines of a bundle one after the other, and keeps those that are up to date.

Every finished engine is listed in engine.json before the next one starts, so that an interrupted
build continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.bundle.graph_refs import generation_graphs, tokenizer_graphs
from var_deploy.config import AUTO, LAYOUT_SETS, TENSORRT, TENSORRT_RTX, LayoutSet
from var_deploy.errors import BackendError, BundleError, UsageError
from var_deploy.host.doctor import gpu_problem
from var_deploy.host.machine import Machine
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.planning.precisions import check_gpu_precision, gpu_precision
from var_deploy.planning.selection import choose_layout
from var_deploy.progress import Progress
from var_deploy.runtime.tensorrt import engine_files
from var_deploy.runtime.tensorrt.engine_files import EngineFolder, EngineRecord
from var_deploy.runtime.tensorrt.job import BuildJob, open_folder, run_in_child, run_job
from var_deploy.runtime.tensorrt.library import Library, load_library
from var_deploy.runtime.tensorrt.target import ANY_DEVICE, BuildOptions, Target
from var_deploy.runtime.weights_check import check_weights

FindDevice = Callable[[], tuple[str, int]]

SHARED_PROFILES_FIXED = (10, 8)


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """One engine after a build; `kept` says that an earlier build had built it already."""

    graph: str
    kept: bool
    size: int
    profiles: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """Result of `build_bundle`.

    Attributes:
        folder: folder of the engines.
        layout: the layout that was built; `reason`: why it was chosen.
        notes: warnings for the user, one line each.
    """

    folder: Path
    target: Target
    layout: LayoutSet
    reason: str
    engines: tuple[EngineResult, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "folder": str(self.folder)}


def engines_of(manifest: Manifest, precision: str, layout: LayoutSet, encoder: bool) -> list[str]:
    """Names of the engines of a layout, in the order of a generation.

    `encoder` adds the graphs `encoder` and `accumulate`. `accumulate` is left out where an older
    bundle lacks it, since editing does not need it. Raises BundleError where another graph is
    missing.
    """
    held = manifest.graphs.get(precision, {})
    wanted = generation_graphs(manifest.model, layout, guidance=manifest.guidance)
    graphs = [graph.name for graph in wanted]
    if encoder:
        extra = [graph.name for graph in tokenizer_graphs()]
        graphs += [name for name in extra if name != names.ACCUMULATE or name in held]
    manifest.graph(precision, names.DECODER)  # raises where the bundle lacks the precision
    for graph in graphs:
        if graph not in manifest.graphs[precision]:
            raise BundleError(
                f"the bundle has no graph {graph} in {precision}, which layout {layout} needs; "
                "export it again with --layout both"
            )
    return graphs


def build_bundle(
    bundle: Path,
    *,
    precision: str | None = None,
    layout: LayoutSet | Literal["auto"] = "auto",
    options: BuildOptions | None = None,
    low_memory: bool = False,
    library: Library | str | None = None,
    encoder: bool = True,
    force: bool = False,
    find_device: FindDevice | None = None,
    find_memory: Callable[[], int] | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the engines of a bundle for this device into engines/<target>/.

    Args:
        precision: "fp16" or "fp32"; None takes fp16 where the bundle has it, int8 never.
        layout: "shared" (one engine for all scales), "per-scale" (one each), "both", or "auto".
        low_memory: build each engine in a process of its own.
        library: "tensorrt", "tensorrt_rtx", or a loaded `Library`; None takes the installed one.
        encoder: build `encoder` and `accumulate` too, which only editing and decoding tokens need.
        force: build finished engines again.
        find_device: returns name and compute capability of the GPU, ("Orin, 8 SMs", 87).
        find_memory: returns the free bytes of the GPU, on which layout "auto" depends.
        progress: called with a message and the fraction done.

    Raises BundleError for a damaged bundle, UsageError for options that exclude each other,
    BackendError where TensorRT is missing or fails or the disk cannot be written, KeyboardInterrupt
    after Ctrl-C. Engines that were finished before are kept.
    """
    report = progress or (lambda message, fraction: None)
    if layout not in (AUTO, *LAYOUT_SETS):
        known = ", ".join((AUTO, *LAYOUT_SETS))
        raise UsageError(f"layout must be one of {known}, found {layout!r}")
    bundle = bundle.absolute()  # a child process may have another working directory
    manifest = read_manifest(bundle)
    if precision is None:
        precision = gpu_precision(manifest.graphs, "TensorRT")
    check_gpu_precision(precision, "TensorRT")
    manifest.graph(precision, names.DECODER)  # refuses a precision that the bundle lacks
    library, options, target = _settle(library, options or BuildOptions(), precision, find_device)
    kind, reason = layout, "as asked"
    if kind == "auto":
        memory = None if library.is_rtx else (find_memory or _free_memory)()
        kind, reason = choose_layout(manifest, memory, precision=precision)
    graphs = engines_of(manifest, precision, kind, encoder)
    _check_sources(bundle, manifest, precision, report)

    folder, notes = open_folder(bundle, target)
    notes += _version_notes(library, kind)
    keys = {g: engine_files.engine_key(manifest, g, precision, options, target) for g in graphs}
    report("looking for finished engines", 0.0)
    wanted = [g for g in graphs if force or not _finished(folder, g, keys[g])]
    _check_disk(folder, manifest, precision, wanted)
    for number, graph in enumerate(wanted):
        job = BuildJob(
            bundle=bundle,
            graph=graph,
            precision=precision,
            key=keys[graph],
            options=options,
            target=target,
        )

        def advance(phase: str, fraction: float, number: int = number, graph: str = graph) -> None:
            done = (number + fraction) / len(wanted)
            report(f"{graph} ({number + 1} of {len(wanted)}): {phase}", done)

        advance("starting", 0.0)
        run = run_in_child if low_memory else run_job
        notes += run(job, library, advance)
    report("done", 1.0)
    folder = engine_files.read_engines(bundle, target)
    return BuildReport(
        folder=folder.path,
        target=target,
        layout=kind,
        reason=reason,
        engines=tuple(_result(folder.record(g), kept=g not in wanted) for g in graphs),
        notes=tuple(dict.fromkeys(notes)),
    )


def _free_memory() -> int:
    from var_deploy.runtime.backends.cuda import Cuda

    cuda = Cuda()
    try:
        return cuda.free_memory()[0]
    finally:
        cuda.close()


def _settle(
    library: Library | str | None,
    options: BuildOptions,
    precision: str,
    find_device: FindDevice | None,
) -> tuple[Library, BuildOptions, Target]:
    """Resolve library, options and target, so that they fit each other."""
    ahead, device, sm = options.compute_capability, ANY_DEVICE, options.compute_capability or 0
    try:
        if not isinstance(library, Library):
            library = load_library(library or (TENSORRT_RTX if ahead is not None else None))
        if ahead is None:
            device, sm = (find_device or _this_device)()
    except BackendError:
        # without a GPU it does not matter which library is missing
        if ahead is None and find_device is None and (problem := gpu_problem(Machine())):
            raise BackendError(
                f"{problem}; engines for another machine are built with {TENSORRT_RTX} and "
                "--compute-capability"
            ) from None
        raise
    if ahead is not None and not library.is_rtx:
        raise UsageError(
            f"--compute-capability is for {TENSORRT_RTX} alone: {TENSORRT} builds for the device "
            "it runs on"
        )
    if library.is_rtx:
        device = ANY_DEVICE
        options = dataclasses.replace(options, compute_capability=sm)
    target = Target(
        library=library.name,
        version=library.version,
        device=device,
        sm=sm,
        precision=precision,
    )
    return library, options, target


def _this_device() -> tuple[str, int]:
    from var_deploy.runtime.backends.cuda import device_name_and_sm

    return device_name_and_sm()


def _check_sources(bundle: Path, manifest: Manifest, precision: str, report: Progress) -> None:
    """Check files and weights of the bundle: damage would not be visible in an engine."""
    prefix = f"{precision}/"
    total = sum(f.size for name, f in manifest.files.items() if name.startswith(prefix))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report("checking the bundle", done / max(total, 1))

    files = BundleFiles(bundle, manifest, precision)
    try:
        files.check(advance)
        check_weights(files)
    finally:
        files.close()


def _version_notes(library: Library, layout: LayoutSet) -> list[str]:
    parts = tuple(int(p) for p in library.version.split(".")[:2] if p.isdigit())
    if layout == "per-scale" or library.is_rtx or parts >= SHARED_PROFILES_FIXED:
        return []
    return [
        f"tensorrt {library.version}: an accuracy bug with several profiles was fixed in 10.8; "
        "compare the images of the shared layout with those of the per-scale layout"
    ]


def _finished(folder: EngineFolder, graph: str, key: str) -> bool:
    record = folder.engines.get(graph)
    return record is not None and record.key == key and folder.intact(record)


def _check_disk(
    folder: EngineFolder, manifest: Manifest, precision: str, graphs: list[str]
) -> None:
    """Create the folder; raise BackendError where the disk has no room for the engines.

    An engine is about as large as its weights.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.path, os.W_OK):
            raise BackendError(f"{folder.path} cannot be written: Permission denied")
        engine_files.remove_leftovers(folder)
        replaced = sum(folder.engines[g].size for g in graphs if g in folder.engines)
        free = shutil.disk_usage(folder.path).free + replaced
    except OSError as error:
        raise BackendError(f"{folder.path} cannot be written: {error.strerror}") from None
    needed = sum(manifest.graph(precision, g).weight_bytes for g in graphs)
    if free < needed:
        raise BackendError(
            f"the disk of {folder.path} has {free / 1e6:.0f} MB free, the engines need about "
            f"{needed / 1e6:.0f} MB"
        )


def _result(record: EngineRecord, *, kept: bool) -> EngineResult:
    return EngineResult(
        graph=record.graph,
        kept=kept,
        size=record.size,
        profiles=record.profiles,
        seconds=record.seconds,
    )
