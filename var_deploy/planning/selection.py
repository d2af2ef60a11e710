"""Resolves "auto" in a `RuntimeConfig`: backend, precision, layout and threads.

`select` is a pure function of the config, the bundle's manifest and facts about the machine.
`Pipeline` collects facts while it opens a backend, and calls `select` again with each new fact;
Ray, Triton and `plan` call it for machines on which nothing can be tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from var_deploy import names
from var_deploy.bundle.graph_refs import held_layouts
from var_deploy.config import (
    AUTO,
    CPU,
    CUDA,
    LAYOUTS,
    TENSORRT,
    TENSORRT_RTX,
    Layout,
    Precision,
    RuntimeConfig,
)
from var_deploy.errors import BackendError, UsageError
from var_deploy.manifest import Manifest
from var_deploy.planning.precisions import (
    ON_GPU,
    check_gpu_precision,
    cpu_precision,
    gpu_precision,
    refuse_int8,
)

if TYPE_CHECKING:
    from var_deploy.planning.memory import Footprint, Library
    from var_deploy.planning.workload import Workload

HEADROOM = 0.9  # share of free memory that layout per-scale may take, since sizes are estimates
ASKED = "as asked for"


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Facts about the TensorRT engines that a machine can run.

    Attributes:
        library: the library that runs them, "tensorrt" or "tensorrt_rtx".
        built: precision → layouts whose engines were built; None where that is not known yet, or
            where the engines will be built later.
        free: free bytes of GPU memory, None where unknown.
        one_memory: CPU and GPU share their memory.
        runner: the library's name in error messages; "" for `library`.
    """

    library: str = TENSORRT
    built: Mapping[str, Collection[Layout]] | None = None
    free: int | None = None
    one_memory: bool = False
    runner: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about the machine that is to run a bundle.

    Attributes:
        engines: engines that the machine may run; None where there are none.
        cuda: whether ONNX Runtime can use a GPU there.
        cores: CPU threads to use by default; None leaves the number to the library.
        int8_problem: error of int8 on the CPU, "" where none is known.
        failed: backend that was tried → reason why it cannot run the bundle.
    """

    engines: Engines | None = None
    cuda: bool = False
    cores: int | None = None
    int8_problem: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Result of `select`: the settings that run a bundle.

    Attributes:
        config: the given config with every "auto" resolved. `threads` is None on a GPU, and on a
            CPU where the library decides.
        reason: why the backend was selected, where the config had "auto".
    """

    config: RuntimeConfig
    reason: str

    @property
    def on_gpu(self) -> bool:
        return self.config.backend != CPU


def check_options(config: RuntimeConfig) -> None:
    """Raise UsageError for options that exclude each other."""
    if config.backend in (AUTO, CPU):
        return
    if config.threads is not None:
        raise UsageError(f"threads are for {CPU}, not for {config.backend}")
    check_gpu_precision(config.precision, config.backend)


def select(config: RuntimeConfig, manifest: Manifest, facts: Facts) -> Selection:
    """Resolve every "auto" in `config`.

    The backend is TensorRT where the machine can run engines, else ONNX Runtime on a GPU, else ONNX
    Runtime on a CPU. A number of threads, or precision int8, selects the CPU.

    Raises UsageError as `check_options`, and BackendError where a backend that `config` names
    cannot run the bundle, or where the CPU computes int8 wrongly.
    """
    check_options(config)
    if config.backend == CPU:
        return _on_cpu(config, manifest, facts, ASKED)
    if config.backend != AUTO:
        if reason := facts.failed.get(config.backend):
            raise BackendError(reason)
        return _on_gpu(config, manifest, facts, config.backend, ASKED)
    passed_over = []
    if config.precision == "int8":
        passed_over.append(f"precision int8 is for {CPU}")
    elif config.threads is None:  # a number of threads selects the CPU
        for backend, title in _gpu_backends(facts):
            try:
                if reason := facts.failed.get(backend):
                    raise BackendError(reason)
                return _on_gpu(config, manifest, facts, backend, "; ".join(passed_over))
            except BackendError as error:
                passed_over.append(f"{title}: {error}")
    return _on_cpu(config, manifest, facts, "; ".join(passed_over))


def _gpu_backends(facts: Facts) -> Iterator[tuple[str, str]]:
    """(backend, its title in reasons) of the GPU backends, best first."""
    if facts.engines is not None:
        yield facts.engines.library, "TensorRT"
    if facts.cuda:
        yield CUDA, CUDA


def _on_cpu(config: RuntimeConfig, manifest: Manifest, facts: Facts, reason: str) -> Selection:
    precision, held = config.precision, manifest.graphs
    if precision == AUTO:
        precision = cpu_precision(held, int8=not facts.int8_problem)
        if "int8" in held and len(held) > 1:
            why = facts.int8_problem or "the bundle was exported with int8"
            reason = "; ".join(filter(None, (reason, why)))
    if precision == "int8":
        refuse_int8(facts.int8_problem)
    layout = _onnx_layout(config, manifest, precision)
    threads = config.threads or facts.cores
    chosen = dataclasses.replace(
        config, backend=CPU, precision=precision, layout=layout, threads=threads
    )
    return Selection(config=chosen, reason=reason)


def _on_gpu(
    config: RuntimeConfig, manifest: Manifest, facts: Facts, backend: str, reason: str
) -> Selection:
    """Select a GPU backend. Raises BackendError where it cannot run the bundle."""
    if backend in (TENSORRT, TENSORRT_RTX):
        return _on_engines(config, manifest, backend, facts.engines or Engines())
    precision = config.precision
    if precision == AUTO:
        precision = gpu_precision(manifest.graphs, CUDA)
    layout = _onnx_layout(config, manifest, precision)
    chosen = dataclasses.replace(config, backend=CUDA, precision=precision, layout=layout)
    return Selection(config=chosen, reason=reason)


def _on_engines(
    config: RuntimeConfig, manifest: Manifest, library: str, engines: Engines
) -> Selection:
    precision, built = config.precision, engines.built
    if precision == AUTO:
        precision = gpu_precision(manifest.graphs, engines.runner or library)
        if built is not None:
            precision = next((p for p in ON_GPU if p in built), precision)
    if config.layout != AUTO:
        layout, reason = config.layout, ASKED
    elif built is not None and len(found := tuple(built.get(precision, ()))) == 1:
        layout, reason = found[0], "its engines were built"
    else:
        layout, reason = choose_layout(
            manifest, engines.free, precision=precision, one_memory=engines.one_memory
        )
    chosen = dataclasses.replace(config, backend=library, precision=precision, layout=layout)
    return Selection(config=chosen, reason=reason)


def _onnx_layout(config: RuntimeConfig, manifest: Manifest, precision: str) -> str:
    """Layout for ONNX Runtime: "shared" where the bundle has it, with one copy of the weights."""
    if config.layout != AUTO:
        return config.layout
    held = held_layouts(manifest.graphs.get(precision, {}))
    return "per-scale" if held == ("per-scale",) else "shared"


# the layout of TensorRT


def choose_layout(
    source: Manifest | Workload,
    memory: int | None,
    *,
    precision: str = "fp16",
    library: Library = "tensorrt",
    one_memory: bool = False,
) -> tuple[Layout, str]:
    """Choose the layout for "auto": (layout, reason).

    On a GPU "per-scale" is chosen where its engines fit into memory: they are static, and so the
    faster ones. Otherwise, and always on a CPU, "shared" is chosen, which holds the weights once.

    Args:
        source: the manifest of a bundle, whose layouts are considered, or a workload.
        memory: bytes that the process may use; None where unknown, as for another machine.
        precision: precision of the bundle's graphs; ignored for a workload, which has its own.
        one_memory: CPU and GPU share their memory.

    Raises BundleError where the bundle has no graphs of that precision.
    """
    from var_deploy.planning.memory import footprint
    from var_deploy.planning.workload import Workload, workload_of

    held: Collection[Layout] = LAYOUTS
    if isinstance(source, Workload):
        workload = source
    else:
        source.graph(precision, names.DECODER)  # refuses a precision that the bundle lacks
        held = held_layouts(source.graphs[precision])
        workload = workload_of(source, cast(Precision, precision))
    if memory is None:
        if "shared" in held:
            return "shared", "one copy of the weights for all scales"
        return "per-scale", "the bundle has no graph for all scales"
    options = {each: footprint(workload, each, library, one_memory=one_memory) for each in held}
    return layout_that_fits(options, memory, library)


def layout_that_fits(
    options: Mapping[Layout, Footprint], memory: int, library: Library
) -> tuple[Layout, str]:
    """Choose one of the layouts in `options` by its memory; see `choose_layout`."""
    if len(options) < 2:
        only: Layout = next(iter(options), "per-scale")
        return only, "the bundle holds no other layout"
    if library != "tensorrt":
        return "shared", "on a CPU every session would hold a copy of its weights"
    needs = {layout: option.peak for layout, option in options.items()}
    said = ", ".join(f"{layout} needs {_gigabytes(peak)}" for layout, peak in needs.items())
    said += f", {_gigabytes(memory)} are free"
    if needs["per-scale"] <= HEADROOM * memory:
        return "per-scale", f"it fits and is the faster one: {said}"
    if needs["shared"] <= memory:
        return "shared", f"per-scale would not leave a tenth free: {said}"
    if needs["per-scale"] <= memory:
        return "per-scale", f"shared does not fit: {said}"
    return "shared", f"neither fits: {said}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
