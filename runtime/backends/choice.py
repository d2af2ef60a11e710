"""Selects and opens the backend that runs a bundle on this machine.

`var_deploy.planning.selection.select` decides, from facts about this machine that are collected
here. Where the selected backend fails to open and the choice was "auto", the failure becomes one
more fact, and `select` decides again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from var_deploy import names
from var_deploy.bundle.graph_refs import held_layouts
from var_deploy.config import AUTO, CPU, CUDA, TENSORRT, TENSORRT_RTX, RuntimeConfig
from var_deploy.errors import BackendError
from var_deploy.host.machine import Machine, check_threads, usable_cores
from var_deploy.manifest import Manifest
from var_deploy.planning import precisions
from var_deploy.planning.precisions import cpu_precision, gpu_precision, refuse_int8
from var_deploy.planning.selection import (
    ASKED,
    Engines,
    Facts,
    Selection,
    check_options,
    select,
)

if TYPE_CHECKING:
    from var_deploy.runtime.backends.cuda import Cuda
    from var_deploy.runtime.backends.protocol import Backend
    from var_deploy.runtime.tensorrt.library import Library
    from var_deploy.runtime.tensorrt.target import Target


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend, ready to open the graphs of one precision and layout.

    Attributes:
        config: the settings in use; nothing in it is "auto".
        reason: why this backend was selected, where the caller asked for "auto".
        reads_graphs: whether the backend loads the ONNX files, which then have to be intact.
    """

    backend: Backend
    config: RuntimeConfig
    reason: str
    reads_graphs: bool


def choose_backend(
    bundle: Path, manifest: Manifest, config: RuntimeConfig, *, cores: int | None = None
) -> Choice:
    """Open the backend of `config`, or for "auto" the best one available. The caller closes it.

    `cores` is the number of CPU threads where `config` leaves it open; None takes the cores that
    the process may use.

    Raises BackendError or BundleError where a backend that was asked for cannot run this bundle, or
    where int8 is computed wrongly here, UsageError for threads out of range or options that exclude
    each other.
    """
    check_threads(config.threads, machine=Machine())
    facts = Facts(
        engines=Engines() if (bundle / names.ENGINES).is_dir() else None,
        cuda=True,  # assumed until it is selected: the check imports ONNX Runtime
        cores=cores or usable_cores(),
    )
    found: _FoundEngines | None = None
    with contextlib.ExitStack() as stack:  # closes the GPU where its engines are not used
        while True:
            selection = select(config, manifest, facts)
            backend = selection.config.backend
            if backend == CPU:
                from var_deploy.runtime.backends.int8_check import int8_problem
                from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend

                processor = OrtCpuBackend(selection.config.threads)
                problem = ""
                if selection.config.precision == "int8" and not facts.int8_problem:
                    problem = int8_problem(processor)
                if not problem:
                    return _choice(selection, processor, reads_graphs=True)
                facts = dataclasses.replace(facts, int8_problem=problem)
                continue
            if backend == CUDA and config.backend == AUTO and not has_cuda_provider():
                facts = dataclasses.replace(facts, cuda=False)
                continue
            try:
                if backend == CUDA:
                    return _choice(selection, open_cuda(config.cuda_graph), reads_graphs=True)
                if found is None:
                    asked = None if config.backend == AUTO else config.backend
                    found = _find_engines(bundle, manifest, asked, config.precision)
                    stack.callback(found.cuda.close)
                    facts = dataclasses.replace(facts, engines=found.facts)
                    continue
                opened = found.open(bundle, manifest, selection.config)
                stack.pop_all()  # the backend closes the GPU
                return _choice(selection, opened, reads_graphs=False)
            except BackendError as error:
                if config.backend != AUTO:
                    raise
                failed = {**facts.failed, backend: str(error)}
                facts = dataclasses.replace(facts, failed=failed)


def choose_single_graph_backend(
    held: Collection[str], config: RuntimeConfig, *, cores: int | None = None
) -> Choice:
    """Open the backend for a bundle of one graph without engines, such as a text encoder.

    Args:
        held: precisions that the bundle has.
        config: the layout is ignored; "auto" takes ONNX Runtime on a GPU where it can, else on the
            CPU, with the precision that an image bundle would take there.
        cores: as in `choose_backend`.

    Raises BackendError where a backend that was asked for is missing, or where int8 is computed
    wrongly here, UsageError for threads out of range or options that exclude each other. The caller
    closes the backend.
    """
    check_threads(config.threads, machine=Machine())
    check_options(config)
    if config.backend in (TENSORRT, TENSORRT_RTX):
        raise BackendError(
            f"a text encoder has no engines for {config.backend}; take {CUDA} or {CPU} for it"
        )
    reason, precision = "", config.precision
    wants_cpu = config.threads is not None or precision == "int8"
    if config.backend == CUDA or (config.backend == AUTO and not wants_cpu):
        try:
            if config.backend == AUTO and not has_cuda_provider():
                raise BackendError("ONNX Runtime here is not built for a GPU")
            taken = gpu_precision(held, CUDA) if precision == AUTO else precision
            settings = dataclasses.replace(config, backend=CUDA, precision=taken)
            selection = Selection(config=settings, reason=ASKED if config.backend == CUDA else "")
            return _choice(selection, open_cuda(config.cuda_graph), reads_graphs=True)
        except BackendError as error:
            if config.backend == CUDA:
                raise
            reason = f"{CUDA}: {error}"
    from var_deploy.runtime.backends.int8_check import int8_problem
    from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend

    processor = OrtCpuBackend(config.threads or cores or usable_cores())
    if precision == AUTO:
        precision = cpu_precision(held)
    if precision == "int8" and (problem := int8_problem(processor)):
        if config.precision == "int8" or len(held) == 1:
            refuse_int8(problem)
        precision, reason = cpu_precision(held, int8=False), problem
    settings = dataclasses.replace(config, backend=CPU, precision=precision)
    return _choice(Selection(config=settings, reason=reason), processor, reads_graphs=True)


def facts_here(bundle: Path) -> Facts:
    """Facts about this machine for `select`, collected without opening the bundle's engines.

    They tell whether ONNX Runtime can use a GPU here and whether the bundle has engines.
    """
    return Facts(
        engines=Engines() if (bundle / names.ENGINES).is_dir() else None,
        cuda=has_cuda_provider() and has_gpu(),
        cores=usable_cores(),
    )


def _choice(selection: Selection, backend: Backend, *, reads_graphs: bool) -> Choice:
    return Choice(
        backend=backend,
        config=selection.config,
        reason=selection.reason,
        reads_graphs=reads_graphs,
    )


def open_cuda(cuda_graph: bool) -> Backend:
    """Open ONNX Runtime on the first GPU. Raises BackendError where that cannot be used."""
    from var_deploy.runtime.backends.onnxruntime_cuda import OrtCudaBackend

    return OrtCudaBackend(cuda_graph=cuda_graph)


@dataclass(frozen=True, kw_only=True)
class _FoundEngines:
    """A bundle's engines for the GPU of this machine; `cuda` holds the GPU open."""

    library: Library
    cuda: Cuda
    targets: Mapping[str, Target]
    facts: Engines

    def open(self, bundle: Path, manifest: Manifest, config: RuntimeConfig) -> Backend:
        from var_deploy.runtime.tensorrt.engine_files import load_plan
        from var_deploy.runtime.tensorrt.session import TensorRtBackend

        target = self.targets[config.precision]
        return TensorRtBackend(
            self.library,
            lambda graph: load_plan(bundle, manifest, graph, target)[1],
            cuda=self.cuda,
            cuda_graph=config.cuda_graph,
        )


def _find_engines(
    bundle: Path, manifest: Manifest, library_name: str | None, precision: str
) -> _FoundEngines:
    """Find the engines of `precision`, or for "auto" of every precision that a GPU can run.

    Raises BackendError where TensorRT or the GPU is missing, or where the bundle has no engines for
    this GPU; the message then names the precision that is preferred.
    """
    from var_deploy.runtime.backends.cuda import Cuda
    from var_deploy.runtime.tensorrt.engine_files import find_target
    from var_deploy.runtime.tensorrt.library import load_library
    from var_deploy.runtime.tensorrt.target import Target

    library = load_library(library_name)
    wanted = [precision]
    if precision == AUTO:
        wanted = [p for p in precisions.ON_GPU if p in manifest.graphs]
    cuda = Cuda()
    try:
        device, sm = cuda.device_name_and_sm()
        targets, built = {}, {}
        complaint: BackendError | None = None
        for each in wanted:
            target = Target(
                library=library.name, version=library.version, device=device, sm=sm, precision=each
            )
            try:
                built[each] = held_layouts(find_target(bundle, target).engines)
                targets[each] = target
            except BackendError as error:
                complaint = complaint or error
        if not targets and complaint is not None:
            raise complaint
        facts = Engines(library=library.name, built=built, free=cuda.free_memory()[0])
        return _FoundEngines(library=library, cuda=cuda, targets=targets, facts=facts)
    except BaseException:
        cuda.close()
        raise


def has_cuda_provider() -> bool:
    """Whether the installed ONNX Runtime was built for CUDA."""
    try:
        import onnxruntime
    except ImportError:
        return False
    from var_deploy.runtime.backends.ort_session import CUDA_PROVIDER

    return CUDA_PROVIDER in onnxruntime.get_available_providers()


def has_gpu() -> bool:
    """Whether CUDA finds a GPU that this process can use."""
    from var_deploy.runtime.backends.cuda import Cuda

    try:
        Cuda().close()
    except BackendError:
        return False
    return True
