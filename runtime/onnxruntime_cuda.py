"""ONNX Runtime on an NVIDIA GPU, over the same arena of device memory as TensorRT."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from typing import Any

from var_deploy.bundle_files import GraphFile
from var_deploy.errors import BackendError, one_line
from var_deploy.installation import pip, pip_command, pip_install
from var_deploy.runtime.cuda import DEVICE, Cuda, CudaMemory
from var_deploy.runtime.ort_session import SILENT, open_session, quiet
from var_deploy.runtime.protocol import Arrays, Launch

PROVIDER = "CUDAExecutionProvider"


class OrtCudaSession:
    """One graph on the GPU."""

    def __init__(self, cuda: Cuda, options: Any, graph: str) -> None:
        self.session: Any = None
        self._cuda, self._options, self._graph = cuda, options, graph
        self._launches: list[OrtCudaLaunch] = []

    def bind(self, inputs: Arrays, outputs: Arrays) -> OrtCudaLaunch:
        problem = None
        try:
            binding = self.session.io_binding()
            for name, array in inputs.items():
                binding.bind_input(name, "cuda", DEVICE, array.dtype, array.shape, array.address)
            for name, array in outputs.items():
                binding.bind_output(name, "cuda", DEVICE, array.dtype, array.shape, array.address)
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            problem = one_line(error)
        if problem:  # raised here for the reason given in `run`
            raise BackendError(f"ONNX Runtime refuses buffers of {self._graph}: {problem}")
        self._launches.append(OrtCudaLaunch(self, binding, (inputs, outputs)))
        return self._launches[-1]

    def run(self, binding: Any) -> None:
        problem = None
        try:
            self.session.run_with_iobinding(binding, self._options)
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            problem = one_line(error)
        if problem:  # raised here: in the traceback above ONNX Runtime's session would live on
            raise BackendError(f"ONNX Runtime failed in {self._graph}: {problem}")

    def close(self) -> None:
        if self.session is not None:
            with contextlib.suppress(BackendError):
                self._cuda.synchronize()  # nothing may be in use when it goes
        while self._launches:
            self._launches.pop().release()
        self.session = None


class OrtCudaLaunch:
    def __init__(self, session: OrtCudaSession, binding: Any, keep: object) -> None:
        self._session, self._binding = session, binding
        self._keep: object = keep  # the binding holds bare addresses of these arrays

    def __call__(self) -> None:
        self._session.run(self._binding)

    def release(self) -> None:
        self._binding = self._keep = None


class OrtCudaBackend(CudaMemory):
    """Opens graphs on the GPU; all of them work on one stream and return before it is done.

    A graph may keep part of its nodes on the CPU: the sizes that `step` reads off its inputs are
    worked out there, on purpose. `session.disable_cpu_ep_fallback` would refuse such a graph, so
    it stays off; a whole session that ended up on the CPU is refused below.

    Args:
        ort: `onnxruntime` or what stands for it; None imports it.
        cuda: the backend's own from here on; None makes one.

    Raises BackendError where onnxruntime-gpu, its CUDA provider or cuda-python is missing.
    """

    name = "onnxruntime-cuda"

    def __init__(self, ort: Any = None, cuda: Cuda | None = None) -> None:
        try:
            self._ort = ort or _import()
            quiet(self._ort)
            if PROVIDER not in self._ort.get_available_providers():
                raise BackendError(
                    f"onnxruntime {self._ort.__version__} has no {PROVIDER}; run {pip()} uninstall "
                    f"onnxruntime, then {pip_install('gpu')}"
                )
            super().__init__(cuda or Cuda())
        except BaseException:
            if cuda is not None:
                cuda.close()
            raise
        self._sessions: list[OrtCudaSession] = []
        self._run_options = self._ort.RunOptions()
        self._run_options.log_severity_level = SILENT
        # a launch need not wait: whoever reads the results waits for the stream
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def open(self, graph: GraphFile) -> OrtCudaSession:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # sizes, nothing more
        options.enable_cpu_mem_arena = False
        opened = OrtCudaSession(self._cuda, self._run_options, graph.stem)
        self._sessions.append(opened)
        providers = [(PROVIDER, self._settings())]
        opened.session = open_session(self._ort, graph, options, providers=providers)
        # where cuDNN or another library is missing, ONNX Runtime goes on without the provider
        if PROVIDER not in opened.session.get_providers():
            raise BackendError(
                f"onnxruntime {self._ort.__version__} does not load its {PROVIDER}: the CUDA "
                "libraries or cuDNN are missing; run "
                f"{pip_command('onnxruntime-gpu[cuda,cudnn]')}"
            )
        return opened

    def finish(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        return launches

    def describe(self) -> dict[str, str]:
        device, sm = self._cuda.device_name_and_sm()
        return {
            "backend": self.name,
            "onnxruntime": self._ort.__version__,
            "device": f"{device} (sm{sm})",
        }

    def close(self) -> None:
        """Sessions first: they free on the stream that goes with the memory."""
        while self._sessions:
            self._sessions.pop().close()
        self._cuda.close()

    def _settings(self) -> dict[str, str]:
        """Options of the provider, by ONNX Runtime's documentation of it."""
        return {
            "device_id": str(DEVICE),
            "user_compute_stream": str(self._cuda.stream),
            "do_copy_in_default_stream": "1",  # in order with the rest
            # the sampler's sums and the logits are fp32 because they need all of its digits
            "use_tf32": "0",
            # every session has an arena, which never gives back: it should not grow by doubling
            "arena_extend_strategy": "kSameAsRequested",
            # not by measuring, which may choose another algorithm the next time, and another image
            "cudnn_conv_algo_search": "HEURISTIC",
        }


def _import() -> Any:
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError:
        raise BackendError(f"onnxruntime-gpu is not installed; run {pip_install('gpu')}") from None
    # finds CUDA and cuDNN where pip put them (from 1.21 on); what it misses it prints, and what
    # is really missing shows when a session is made
    if PROVIDER in ort.get_available_providers() and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return ort
