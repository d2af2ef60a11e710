"""Which inference library runs a bundle here, on which of its graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from var_deploy import names
from var_deploy.errors import BackendError, UsageError
from var_deploy.manifest import Manifest
from var_deploy.planning import precisions
from var_deploy.planning.precisions import check_gpu_precision, cpu_precision, gpu_precision
from var_deploy.runtime.loop import Layout
from var_deploy.runtime.protocol import Backend
from var_deploy.runtime.tensorrt.engine_files import ENGINES, EngineFolder, find_target, load_plan
from var_deploy.runtime.tensorrt.target import Target

CPU, CUDA = precisions.CPU, "onnxruntime-cuda"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend, ready to open the graphs of one precision and layout.

    Attributes:
        reason: why this one, where the caller left it open.
        reads_graphs: whether it loads the ONNX files themselves, which then have to be intact.
    """

    backend: Backend
    precision: str
    layout: Layout
    reason: str
    reads_graphs: bool


def choose_backend(
    bundle: Path,
    manifest: Manifest,
    *,
    backend: str = "auto",
    precision: str = "auto",
    layout: str = "auto",
    threads: int | None = None,
    cuda_graph: bool = True,
) -> Choice:
    """Set up `backend`, or the best that there is: engines, then ONNX Runtime on a GPU, then on a
    CPU. The caller closes it.

    Raises BackendError or BundleError where a backend that was asked for cannot run this bundle, or
    where int8 is computed wrongly here, UsageError for threads or int8 with a GPU.
    """
    if backend == "auto":
        return _best(bundle, manifest, precision, layout, threads, cuda_graph)
    if backend == CPU:
        return _on_cpu(manifest, precision, layout, threads, "as asked for")
    if threads is not None:
        raise UsageError(f"threads are for {CPU}, not for {backend}")
    check_gpu_precision(precision, backend)
    if backend == CUDA:
        return _on_cuda(manifest, precision, layout, "as asked for", cuda_graph)
    return _on_tensorrt(bundle, manifest, backend, precision, layout, cuda_graph)


def _best(
    bundle: Path,
    manifest: Manifest,
    precision: str,
    layout: str,
    threads: int | None,
    cuda_graph: bool,
) -> Choice:
    passed_over = []
    if precision == "int8":
        passed_over.append(f"precision int8 is for {CPU}")
    elif threads is None:  # who names CPU threads wants the CPU
        if (bundle / ENGINES).is_dir():
            try:
                return _on_tensorrt(bundle, manifest, None, precision, layout, cuda_graph)
            except BackendError as error:
                passed_over.append(f"TensorRT: {error}")
        if _has_cuda_provider():
            try:
                return _on_cuda(manifest, precision, layout, "; ".join(passed_over), cuda_graph)
            except BackendError as error:
                passed_over.append(f"{CUDA}: {error}")
    return _on_cpu(manifest, precision, layout, threads, "; ".join(passed_over))


def _on_cpu(
    manifest: Manifest, precision: str, layout: str, threads: int | None, reason: str
) -> Choice:
    from var_deploy.runtime.int8_check import check_int8, int8_problem
    from var_deploy.runtime.onnxruntime_cpu import OrtCpuBackend

    chosen = OrtCpuBackend(threads)
    if precision == "auto":
        precision = cpu_precision(manifest.graphs)
        if precision == "int8" and len(manifest.graphs) > 1:
            why = int8_problem(chosen) or "the bundle was exported with int8"
            precision = cpu_precision(manifest.graphs, int8=not int8_problem(chosen))
            reason = "; ".join(filter(None, (reason, why)))
    if precision == "int8":
        check_int8(chosen)
    return Choice(
        backend=chosen,
        precision=precision,
        layout=_onnx_layout(manifest, precision, layout),
        reason=reason,
        reads_graphs=True,
    )


def _on_cuda(
    manifest: Manifest, precision: str, layout: str, reason: str, cuda_graph: bool
) -> Choice:
    from var_deploy.runtime.onnxruntime_cuda import OrtCudaBackend

    if precision == "auto":
        precision = gpu_precision(manifest.graphs, CUDA)
    return Choice(
        backend=OrtCudaBackend(cuda_graph=cuda_graph),
        precision=precision,
        layout=_onnx_layout(manifest, precision, layout),
        reason=reason,
        reads_graphs=True,
    )


def _on_tensorrt(
    bundle: Path,
    manifest: Manifest,
    library_name: str | None,
    precision: str,
    layout: str,
    cuda_graph: bool,
) -> Choice:
    from var_deploy.runtime.cuda import Cuda
    from var_deploy.runtime.tensorrt.library import load_library
    from var_deploy.runtime.tensorrt.session import TensorRtBackend

    library = load_library(library_name)
    if precision == "auto":
        gpu_precision(manifest.graphs, library.name)  # refuses a bundle that has none
    cuda = Cuda()
    try:
        device, sm = cuda.device_name_and_sm()
        wanted = precisions.ON_GPU if precision == "auto" else (precision,)
        targets = [
            Target(
                library=library.name, version=library.version, device=device, sm=sm, precision=p
            )
            for p in wanted
            if p in manifest.graphs or precision != "auto"
        ]
        folder, target = _first_built(bundle, targets)
        free, _ = cuda.free_memory()
        chosen, reason = _engine_layout(manifest, folder, target.precision, layout, free)
        return Choice(
            backend=TensorRtBackend(
                library,
                lambda graph: load_plan(bundle, manifest, graph, target)[1],
                cuda=cuda,
                cuda_graph=cuda_graph,
            ),
            precision=target.precision,
            layout=chosen,
            reason=reason,
            reads_graphs=False,
        )
    except BaseException:
        cuda.close()
        raise


def _first_built(bundle: Path, targets: list[Target]) -> tuple[EngineFolder, Target]:
    """The engines of the first target that has some; complains about the first one if none has."""
    complaint: BackendError | None = None
    for target in targets:
        try:
            return find_target(bundle, target), target
        except BackendError as error:
            complaint = complaint or error
    raise complaint or BackendError(f"{bundle} has no graphs that engines could be built from")


def _engine_layout(
    manifest: Manifest, folder: EngineFolder, precision: str, layout: str, free: int
) -> tuple[Layout, str]:
    """The layout whose engines were built; by memory where both were."""
    if layout != "auto":
        return _named(layout), "as asked for"
    built = [
        name
        for name, graph in (("shared", names.STEP), ("per-scale", names.scale_graph(0)))
        if graph in folder.engines
    ]
    if len(built) == 1:
        return _named(built[0]), "its engines were built"
    from var_deploy.planning.plan import choose_layout

    return choose_layout(manifest, free, precision=precision)


def _onnx_layout(manifest: Manifest, precision: str, layout: str) -> Layout:
    """Shared where the bundle has it: every session holds weights of its own."""
    if layout != "auto":
        return _named(layout)
    graphs = manifest.graphs.get(precision, {})
    return "shared" if names.STEP in graphs or not graphs else "per-scale"


def _named(layout: str) -> Layout:
    if layout not in get_args(Layout):
        raise UsageError(f"layout must be one of {', '.join(get_args(Layout))}, found {layout!r}")
    return cast(Layout, layout)


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    from var_deploy.runtime.onnxruntime_cuda import PROVIDER

    return PROVIDER in onnxruntime.get_available_providers()
