"""The worker that runs the bundle's graphs with OpenVINO on the CPU, a peer of `bench`.

    python -m var_deploy.bench.openvino_peer BUNDLE --hint f32 --batch N --threads N

OpenVINO is fastest with static graphs, one compiled model per scale: with `step` it infers the
shapes of a thousand operations in every launch. Measured with pocket on one thread: 45 ms per
image against 66 ms. Each compiled model packs its own copy of the weights, so memory grows with
the number of scales (460 MB against 180 MB; ten copies of 0.8 GB for d16 in fp32). Use `--layout
shared` on machines without that much memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.bench.conditions import bench_request
from var_deploy.bench.worker import About, Sample, serve, worker_parser
from var_deploy.bundle.files import GraphFile
from var_deploy.bundle.graph_refs import held_layouts
from var_deploy.config import Layout
from var_deploy.errors import BackendError, UsageError, one_line
from var_deploy.host.installation import pip_install
from var_deploy.host.machine import Machine, check_threads, usable_cores
from var_deploy.manifest import check_files, read_manifest
from var_deploy.runtime.backends.host_memory import HostMemory, host_view
from var_deploy.runtime.backends.protocol import Arrays, Launch
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.measure import add_launches, launch_names
from var_deploy.runtime.request import Batches, Images

HINTS = ("f32", "bf16")


class OpenVinoSession:
    """One compiled model; each binding has its own infer request."""

    def __init__(self, openvino: Any, compiled: Any, graph: str) -> None:
        self._openvino, self._compiled, self._graph = openvino, compiled, graph

    def bind(self, inputs: Arrays, outputs: Arrays) -> OpenVinoLaunch:
        request = self._compiled.create_infer_request()
        for name, array in (*inputs.items(), *outputs.items()):
            view = host_view(array)
            request.set_tensor(name, self._openvino.Tensor(view, shared_memory=True))
        return OpenVinoLaunch(request, (inputs, outputs), self._graph)

    def close(self) -> None:
        self._compiled = None


class OpenVinoLaunch:
    """An infer request with all tensors bound."""

    def __init__(self, request: Any, keep: object, graph: str) -> None:
        self._request, self._graph = request, graph
        self._keep = keep  # the request's tensors are views of these arrays

    def __call__(self) -> None:
        try:
            self._request.infer(share_outputs=True)  # else every output is copied once more
        except Exception as error:  # RuntimeError, and other types from plugins
            raise BackendError(f"OpenVINO failed in {self._graph}: {one_line(error)}") from error


class OpenVinoBackend(HostMemory):
    """Opens graphs with OpenVINO on the CPU.

    Args:
        hint: precision to compute in, "f32" or "bf16". OpenVINO silently computes in f32 where the
            CPU has no bf16; `describe` shows that.
        threads: threads per graph; 0 takes every core that the process may use.

    Raises BackendError where openvino is not installed, UsageError for an unknown hint or threads
    out of range.
    """

    name = "openvino"

    def __init__(self, hint: str = "f32", threads: int = 0) -> None:
        if hint not in HINTS:
            raise UsageError(f"hint must be one of {', '.join(HINTS)}, found {hint!r}")
        if threads < 0:
            raise UsageError(f"threads must be 0 (every core) or more, found {threads}")
        threads = check_threads(threads or None, machine=Machine()) or usable_cores() or 0
        try:
            import openvino
        except ImportError:
            raise BackendError(
                f"openvino is not installed; run {pip_install('openvino', 'openvino')}, or leave "
                "it out of --against"
            ) from None
        self._openvino, self._core, self._hint = openvino, openvino.Core(), hint
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.computes = hint if hint == "f32" or "BF16" in capabilities else "f32"
        self._threads = str(threads) if threads else "all cores"

    def open(self, graph: GraphFile) -> OpenVinoSession:
        graph.read()  # raises for a damaged file before OpenVINO reads it
        try:
            compiled = self._core.compile_model(str(graph.path), "CPU", self._options)
            # the values in use: at most one thread per core, and a precision that the CPU has
            self.computes = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            self._threads = str(compiled.get_property("INFERENCE_NUM_THREADS"))
        except Exception as error:  # RuntimeError, and other types from plugins
            raise BackendError(f"OpenVINO refuses {graph.path.name}: {one_line(error)}") from error
        return OpenVinoSession(self._openvino, compiled, graph.ref.name)

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        return launches

    def close(self) -> None:
        """Does nothing: models and memory are freed with the loop."""

    def describe(self) -> dict[str, str]:
        precision = self._hint
        if self.computes != self._hint:
            precision += f" (computed in {self.computes}: this CPU has no {self._hint})"
        return {
            "backend": self.name,
            "openvino": self._openvino.__version__,
            "threads": self._threads,
            "precision": precision,
            "settings": "PERFORMANCE_HINT LATENCY",
        }


class OpenVinoWorker:
    """The worker that generates images with OpenVINO, in batches of the bundle's B.

    Args:
        images: images per generation.
        precision: precision of the bundle's graphs; `hint`: the precision that computes them.
        layout: None takes the static graphs, or `step` where the bundle has only that.

    Attributes:
        images: images of the last generation, [N, side, side, channels] uint8.

    Raises BundleError for a damaged bundle, BackendError where OpenVINO is missing or fails.
    """

    def __init__(
        self,
        bundle: Path,
        images: int,
        *,
        precision: str = "fp32",
        hint: str = "f32",
        layout: Layout | None = None,
        threads: int = 0,
    ) -> None:
        self._manifest = manifest = read_manifest(bundle)
        if layout is None:
            held = held_layouts(manifest.graphs.get(precision, {}))
            layout = "per-scale" if "per-scale" in held else "shared"
        check_files(bundle, manifest, prefix=f"{precision}/", hashes=False)
        self._backend = OpenVinoBackend(hint, threads)
        self._layout, self._graphs = layout, precision
        t = manifest.model.tokenizer
        self.images = Images.blank((images, *t.image_size, t.image_channels), 0)
        self._loop = ScaleLoop(bundle, manifest, self._backend, precision, layout)
        self._clock = self._loop.start_clock()
        self._clock.each = True
        self._batches = Batches(manifest, self._loop, cancelled=lambda: False)

    def describe(self) -> About:
        found = self._backend.describe()
        found["layout"], found["graphs"] = self._layout, self._graphs
        found["images a launch"] = str(self._manifest.batch)
        if self._backend.computes != "f32":
            found["tokens"] = "replaced: to draw them takes fp32"
        return About(settings=found, graphs=self._graphs)

    def generate(self) -> Sample:
        request = bench_request(self._manifest, len(self.images), self._forced())
        self._clock.laps()  # drop earlier marks
        started = time.perf_counter()
        self.images = self._batches.draw(request)
        seconds = time.perf_counter() - started
        return Sample(
            seconds=seconds,
            launches=add_launches(self._clock.laps(), launch_names(self._manifest)),
        )

    def close(self) -> None:
        self._loop.close()

    def _forced(self) -> tuple[NDArray[np.int64], ...]:
        """Tokens that replace the sampled ones in bf16; () in f32.

        In bf16 several codes have the same cumulative probability, so the sampler may find no code,
        which the loop refuses. The sampler still runs, so the time is that of a generation.
        """
        if self._backend.computes == "f32":
            return ()
        model, count = self._manifest.model, len(self.images)
        shapes = [(count, length, *model.token_shape) for length in model.scale_lengths]
        return tuple(np.zeros(shape, np.int64) for shape in shapes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = worker_parser(
        "var_deploy.bench.openvino_peer", threads="every core that the process may use"
    )
    parser.add_argument("--precision", default="fp32", help="of the bundle's graphs")
    parser.add_argument("--hint", choices=HINTS, default="f32", help="what they are computed in")
    parser.add_argument("--layout", choices=["per-scale", "shared"], help="default: per-scale")
    given: Any = parser.parse_args(arguments)

    def load() -> OpenVinoWorker:
        return OpenVinoWorker(
            given.bundle,
            given.batch,
            precision=given.precision,
            hint=given.hint,
            layout=given.layout,
            threads=given.threads,
        )

    return serve(load)


if __name__ == "__main__":
    sys.exit(main())
