"""Which inference library runs a bundle here, on which of its graphs.

The rule is `var_deploy.planning.selection.select`. Here it is told about this machine, and what it
selects is opened; where that fails and the choice was open, the failure is one more fact.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from var_deploy.bundle.graph_refs import held_layouts
from var_deploy.config import AUTO, CPU, CUDA, RuntimeConfig
from var_deploy.errors import BackendError
from var_deploy.host.machine import Machine, check_threads, usable_cores
from var_deploy.manifest import Manifest
from var_deploy.planning import precisions
from var_deploy.planning.selection import Engines, Facts, Selection, select
from var_deploy.runtime.backends.cuda import Cuda
from var_deploy.runtime.backends.protocol import Backend
from var_deploy.runtime.tensorrt.engine_files import ENGINES, find_target, load_plan
from var_deploy.runtime.tensorrt.library import Library
from var_deploy.runtime.tensorrt.target import Target


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend, ready to open the graphs of one precision and layout.

    Attributes:
        config: what was settled: nothing in it is "auto".
        reason: why this one, where the caller left it open.
        reads_graphs: whether it loads the ONNX files themselves, which then have to be intact.
    """

    backend: Backend
    config: RuntimeConfig
    reason: str
    reads_graphs: bool


def choose_backend(
    bundle: Path, manifest: Manifest, config: RuntimeConfig, *, cores: int | None = None
) -> Choice:
    """Set up the backend of `config`, or the best that there is. The caller closes it.

    `cores` is how many CPU threads are taken where their number is open; None takes those that the
    process may use.

    Raises BackendError or BundleError where a backend that was asked for cannot run this bundle, or
    where int8 is computed wrongly here, UsageError for threads out of range or options that exclude
    each other.
    """
    check_threads(config.threads, machine=Machine())
    facts = Facts(
        engines=Engines() if (bundle / ENGINES).is_dir() else None,
        cuda=True,  # until it would be taken: looking means importing ONNX Runtime
        cores=cores or usable_cores(),
    )
    found: _FoundEngines | None = None
    with contextlib.ExitStack() as stack:  # the GPU of engines that are not taken
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
            if backend == CUDA and config.backend == AUTO and not _has_cuda_provider():
                facts = dataclasses.replace(facts, cuda=False)
                continue
            try:
                if backend == CUDA:
                    return _choice(selection, _open_cuda(config.cuda_graph), reads_graphs=True)
                if found is None:
                    asked = None if config.backend == AUTO else config.backend
                    found = _find_engines(bundle, manifest, asked, config.precision)
                    stack.callback(found.cuda.close)
                    facts = dataclasses.replace(facts, engines=found.facts)
                    continue
                opened = found.open(bundle, manifest, selection.config)
                stack.pop_all()  # the backend closes it
                return _choice(selection, opened, reads_graphs=False)
            except BackendError as error:
                if config.backend != AUTO:
                    raise
                failed = {**facts.failed, backend: str(error)}
                facts = dataclasses.replace(facts, failed=failed)


def facts_here(bundle: Path) -> Facts:
    """What can be told of this machine without opening a bundle's engines: whether it has a GPU
    that ONNX Runtime can use, and whether the bundle has engines at all."""
    return Facts(
        engines=Engines() if (bundle / ENGINES).is_dir() else None,
        cuda=_has_cuda_provider() and _has_gpu(),
        cores=usable_cores(),
    )


def _choice(selection: Selection, backend: Backend, *, reads_graphs: bool) -> Choice:
    return Choice(
        backend=backend,
        config=selection.config,
        reason=selection.reason,
        reads_graphs=reads_graphs,
    )


def _open_cuda(cuda_graph: bool) -> Backend:
    from var_deploy.runtime.backends.onnxruntime_cuda import OrtCudaBackend

    return OrtCudaBackend(cuda_graph=cuda_graph)


@dataclass(frozen=True, kw_only=True)
class _FoundEngines:
    """A bundle's engines for the GPU of this machine, which is held open."""

    library: Library
    cuda: Cuda
    targets: Mapping[str, Target]
    facts: Engines

    def open(self, bundle: Path, manifest: Manifest, config: RuntimeConfig) -> Backend:
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
    """Engines of `precision`, or with "auto" of every precision that a GPU can run.

    Raises BackendError where TensorRT or the GPU is missing, and where there are no engines for it:
    what is said is about the precision that would be taken first.
    """
    from var_deploy.runtime.tensorrt.library import load_library

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


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    from var_deploy.runtime.backends.onnxruntime_cuda import PROVIDER

    return PROVIDER in onnxruntime.get_available_providers()


def _has_gpu() -> bool:
    try:
        Cuda().close()
    except BackendError:
        return False
    return True
