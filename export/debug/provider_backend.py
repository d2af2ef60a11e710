"""ONNX Runtime as a backend of fp16 studies, with any execution provider.

Beside the interpreter of `interpreter_backend`, which imitates tensor cores on a CPU, this shows
what a device does. The graphs are those of the bundle with one more output, the largest magnitude
of each fp16 value, so that no value has to be copied; ONNX Runtime cannot fuse across a value that
is watched, as it may without. Where a bundle has both layouts, `step` runs; the encoder does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from var_deploy import names
from var_deploy.bundle.files import GraphFile
from var_deploy.errors import BackendError
from var_deploy.export.debug.interpreter_backend import Watch, title_of
from var_deploy.runtime.backends.host_memory import HostMemory, host_view
from var_deploy.runtime.backends.onnxruntime_cuda import import_onnxruntime
from var_deploy.runtime.backends.ort_session import CUDA_PROVIDER, open_session, quiet
from var_deploy.runtime.backends.protocol import Arrays, Launch

PEAKS = "largest magnitudes"  # an output [number of fp16 values], fp32
ONE = f"{PEAKS}: shape"


class ProviderBackend(HostMemory):
    """Runs graphs with one execution provider of ONNX Runtime, from and to host memory.

    Args:
        provider: its name, such as "CUDAExecutionProvider".
        watch, announce: as for `TorchBackend`; `watch` sees the largest magnitude of each fp16
            value in the value's place, and no fp32 values.

    Attributes:
        choices: as for `TorchBackend`.

    Raises BackendError where ONNX Runtime lacks the provider.
    """

    def __init__(
        self,
        provider: str,
        watch: Watch | None = None,
        announce: Callable[[str], None] = lambda title: None,
    ) -> None:
        self._ort = import_onnxruntime()
        available = self._ort.get_available_providers()
        if provider not in available:
            raise BackendError(
                f"onnxruntime {self._ort.__version__} has no {provider}, expected one of "
                f"{', '.join(available)}"
            )
        quiet(self._ort)
        self.name, self.watch, self.announce = provider, watch, announce
        self.choices: list[NDArray[np.int64]] = []

    def open(self, graph: GraphFile) -> _WatchedSession:
        model, values, drawn = with_peaks(graph.read(), watched=self.watch is not None)
        options = self._ort.SessionOptions()
        options.enable_cpu_mem_arena = False
        # as in the runtime: TF32 would lose digits of fp32 products, and a search may choose
        # another algorithm the next time
        settings = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        settings = settings if self.name == CUDA_PROVIDER else {}
        session = open_session(
            *(self._ort, graph, options), data=model, providers=[(self.name, settings)]
        )
        if session.get_providers()[0] != self.name:
            raise BackendError(f"onnxruntime {self._ort.__version__} does not load {self.name}")
        return _WatchedSession(self, graph, session, values, drawn)

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        return launches

    def describe(self) -> dict[str, str]:
        return {"backend": self.name, "onnxruntime": str(self._ort.__version__)}

    def close(self) -> None:
        """Do nothing: sessions end with the loop that opened them."""


class _WatchedSession:
    """A graph that `ProviderBackend` has opened.

    Args:
        values: (node, value) of every entry of `PEAKS`.
        drawn: the value of the tokens before forced ones replace them, "" in other graphs.
    """

    def __init__(
        self,
        backend: ProviderBackend,
        graph: GraphFile,
        session: Any,
        values: Sequence[tuple[str, str]],
        drawn: str,
    ) -> None:
        self._backend, self._graph, self._session = backend, graph, session
        self._values, self._drawn = values, drawn

    def bind(self, inputs: Arrays, outputs: Arrays) -> Launch:
        feeds = {name: host_view(array) for name, array in inputs.items()}
        results = {name: host_view(array) for name, array in outputs.items()}
        return lambda: self._run(feeds, results)

    def _run(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        title = title_of(self._graph, inputs)
        self._backend.announce(title)
        wanted = [
            *outputs,
            *([self._drawn] if self._drawn else []),
            *([PEAKS] * bool(self._values)),
        ]
        found = dict(zip(wanted, self._session.run(wanted, inputs), strict=True))
        for name, place in outputs.items():
            place[...] = found[name]
        if self._drawn:
            self._backend.choices.append(found[self._drawn])
        if self._values and self._backend.watch:
            see = self._backend.watch(title)
            # back to fp16, since `watch` leaves fp32 values out; what overflows becomes infinite
            peaks = torch.from_numpy(found[PEAKS]).half()
            for (node, value), peak in zip(self._values, peaks, strict=True):
                see(node, value, peak)

    def close(self) -> None:
        self._session = None


def with_peaks(graph: bytes, *, watched: bool) -> tuple[bytes, list[tuple[str, str]], str]:
    """Add outputs to a graph: the tokens that it draws, and with `watched` the output `PEAKS`.

    Returns the graph, (node, value) of every entry of `PEAKS`, and the name of the drawn tokens.
    """
    model = onnx.load_model_from_string(graph)
    nodes = model.graph.node
    drawn = next((node.input[2] for node in nodes if names.TOKENS in node.output), "")
    if drawn:
        model.graph.output.append(helper.make_tensor_value_info(drawn, TensorProto.INT64, None))
    if not watched:
        return model.SerializeToString(), [], drawn
    typed = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*typed.value_info, *typed.output)}
    half = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT16}
    values = [(node.name, name) for node in nodes for name in node.output if name in half]
    if not values:
        return model.SerializeToString(), [], drawn
    added, rows = [], []
    for number, (_, name) in enumerate(values):
        absolute, largest, full, row = (f"{PEAKS} {number}.{step}" for step in range(4))
        added += [
            helper.make_node("Abs", [name], [absolute]),
            helper.make_node("ReduceMax", [absolute], [largest], keepdims=0),
            helper.make_node("Cast", [largest], [full], to=TensorProto.FLOAT),
            helper.make_node("Reshape", [full, ONE], [row]),
        ]
        rows.append(row)
    model.graph.initializer.append(helper.make_tensor(ONE, TensorProto.INT64, [1], [1]))
    nodes.extend([*added, helper.make_node("Concat", rows, [PEAKS], axis=0)])
    model.graph.output.append(helper.make_tensor_value_info(PEAKS, TensorProto.FLOAT, [len(rows)]))
    return model.SerializeToString(), values, drawn
