"""The variants that `device_check` compares: backend, precision and layout of a bundle."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from var_deploy.bundle.graph_refs import held_layouts
from var_deploy.config import CPU, CUDA, Layout, Precision
from var_deploy.host.installation import pip, pip_install
from var_deploy.manifest import Manifest
from var_deploy.runtime.backends.cuda import Cuda
from var_deploy.runtime.backends.int8_check import check_int8
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.backends.onnxruntime_cuda import PROVIDER, OrtCudaBackend
from var_deploy.runtime.backends.protocol import Backend, Clock
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.tensorrt.engine_files import find_target, load_plan
from var_deploy.runtime.tensorrt.library import Library
from var_deploy.runtime.tensorrt.session import TensorRtBackend
from var_deploy.runtime.tensorrt.target import Target


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A backend, precision and layout for a bundle.

    Attributes:
        backend: `config.CPU`, `CUDA` or `TENSORRT`, which here stands for tensorrt_rtx as well.
        cuda_graph: on a GPU, record each launch once and replay it.
    """

    backend: str
    precision: Precision
    layout: Layout
    cuda_graph: bool = True

    @property
    def title(self) -> str:
        graphs = "" if self.cuda_graph else ", no CUDA graph"
        return f"{self.backend} {self.precision} {self.layout}{graphs}"


@dataclass(frozen=True, kw_only=True)
class Running:
    """An opened variant.

    Attributes:
        runs_on: versions and settings of its backend.
        free: free bytes of device memory before it was opened, 0 on a CPU.
        cuda: its GPU, None on a CPU.
    """

    loop: ScaleLoop
    clock: Clock
    runs_on: dict[str, str]
    free: int
    cuda: Cuda | None


def onnxruntime_lacks(manifest: Manifest, variant: Variant) -> str:
    """Why ONNX Runtime cannot run a variant, "" where it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return f"onnxruntime is not installed; run {pip_install('cpu')}"
    if variant.layout not in held_layouts(manifest.graphs.get(variant.precision, {})):
        return f"the bundle has no layout {variant.layout} in {variant.precision}"
    if variant.backend == CUDA:
        import onnxruntime

        if PROVIDER not in onnxruntime.get_available_providers():
            return (
                f"onnxruntime {onnxruntime.__version__} has no {PROVIDER}; run {pip()} uninstall "
                f"onnxruntime, then {pip_install('gpu')}"
            )
    return ""


@contextlib.contextmanager
def opened(
    bundle: Path, manifest: Manifest, variant: Variant, library: Library | None
) -> Iterator[Running]:
    """Open a variant for the time of the block.

    `library` is TensorRT, for variants with engines. Raises BackendError where the variant cannot
    run.
    """
    cuda, free = None, 0
    backend: Backend
    if variant.backend == CPU:
        backend = OrtCpuBackend()
        if variant.precision == "int8":
            check_int8(backend)
    else:
        cuda = Cuda()
        try:
            free = cuda.free_memory()[0]
            if variant.backend == CUDA:
                backend = OrtCudaBackend(cuda=cuda, cuda_graph=variant.cuda_graph)
            else:
                assert library is not None
                backend = _tensorrt(bundle, manifest, variant, library, cuda)
        except BaseException:
            cuda.close()
            raise
    loop = ScaleLoop(bundle, manifest, backend, variant.precision, variant.layout)
    try:
        clock, runs_on = loop.start_clock(), backend.describe()
        yield Running(loop=loop, clock=clock, runs_on=runs_on, free=free, cuda=cuda)
    finally:
        loop.close()


def _tensorrt(
    bundle: Path, manifest: Manifest, variant: Variant, library: Library, cuda: Cuda
) -> TensorRtBackend:
    device, sm = cuda.device_name_and_sm()
    target = Target(
        library=library.name,
        version=library.version,
        device=device,
        sm=sm,
        precision=variant.precision,
    )
    find_target(bundle, target)
    return TensorRtBackend(
        library,
        lambda graph: load_plan(bundle, manifest, graph, target)[1],
        cuda=cuda,
        cuda_graph=variant.cuda_graph,
    )
