"""ONNX Runtime on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_deploy.errors import BackendError, UsageError
from var_deploy.runtime.host_memory import HostMemory
from var_deploy.runtime.protocol import Arrays, Launch


class OrtSession:
    """One graph; weights are mapped from weights.bin and packed once."""

    def __init__(self, session: Any, graph: str) -> None:
        self._session, self._graph = session, graph

    def bind(self, inputs: Arrays, outputs: Arrays) -> OrtLaunch:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.address)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.address)
        return OrtLaunch(self._session, binding, (inputs, outputs), self._graph)

    def close(self) -> None:
        self._session = None


class OrtLaunch:
    def __init__(self, session: Any, binding: Any, keep: object, graph: str) -> None:
        self._session, self._binding, self._graph = session, binding, graph
        self._keep = keep  # the binding holds bare pointers into these arrays

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            raise BackendError(f"ONNX Runtime failed in {self._graph}: {_line(error)}") from error


class OrtCpuBackend(HostMemory):
    """Opens graphs on the CPU.

    Args:
        threads: for one graph; None takes every physical core.

    Raises BackendError where onnxruntime is not installed, UsageError for threads below 1.
    """

    name = "onnxruntime-cpu"

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, found {threads}")
        try:
            import onnxruntime
        except ImportError:
            raise BackendError(
                'onnxruntime is not installed; run pip install "var-deploy[cpu]"'
            ) from None
        self._ort, self._threads = onnxruntime, threads

    def open(self, graph: Path) -> OrtSession:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # ONNX Runtime's arena grows by doubling and never gives back: after the decoder of a d16 it
        # held 250 MB more than was in use, and every session has one of its own
        options.enable_cpu_mem_arena = False
        try:
            session = self._ort.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            raise BackendError(f"ONNX Runtime refuses {graph.name}: {_line(error)}") from error
        return OrtSession(session, graph.stem)

    def finish(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        return launches

    def close(self) -> None:
        """Nothing is held here: sessions and memory go with the loop."""

    def describe(self) -> dict[str, str]:
        threads = str(self._threads) if self._threads else "all cores"
        return {"backend": self.name, "onnxruntime": self._ort.__version__, "threads": threads}


def _line(error: Exception) -> str:
    """ONNX Runtime's message on one line."""
    return " ".join(str(error).split())
