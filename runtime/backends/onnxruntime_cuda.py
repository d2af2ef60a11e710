"""The backend for ONNX Runtime on an NVIDIA GPU; device memory comes from `backends.cuda`."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from typing import Any

from var_deploy.bundle.files import GraphFile
from var_deploy.config import CUDA
from var_deploy.errors import BackendError, one_line
from var_deploy.host.installation import pip, pip_command, pip_install
from var_deploy.runtime.backends.cuda import DEVICE, Cuda, CudaMemory, Graph
from var_deploy.runtime.backends.ort_session import CUDA_PROVIDER, SILENT, open_session, quiet
from var_deploy.runtime.backends.protocol import Arrays, Launch

PROVIDER = CUDA_PROVIDER
WARM_UPS = 2  # the first run allocates and loads kernels, which is forbidden in a capture


class OrtCudaSession:
    """One graph, loaded on the GPU.

    A run that waits for the stream returns its page-locked buffers to ONNX Runtime at its end; a
    run that does not wait keeps them. So all runs wait except a recorded one, whose copies are
    repeated by every launch of the CUDA graph.

    Args:
        waiting, recording: RunOptions of runs that wait, and of recorded runs.
    """

    def __init__(self, cuda: Cuda, waiting: Any, recording: Any, graph: str) -> None:
        self.session: Any = None
        self._cuda, self._graph = cuda, graph
        self._waiting, self._recording = waiting, recording
        self._launches: list[OrtCudaLaunch] = []
        self._recorded: Any = None  # a binding whose run was recorded

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
        self._launches.append(OrtCudaLaunch(self, self._cuda, binding, (inputs, outputs)))
        return self._launches[-1]

    def run(self, binding: Any, *, recording: bool = False) -> None:
        problem = None
        if recording:
            self._recorded = binding
        try:
            how = self._recording if recording else self._waiting
            self.session.run_with_iobinding(binding, how)
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            problem = one_line(error)
        if problem:  # raised here: in the traceback above ONNX Runtime's session would live on
            raise BackendError(f"ONNX Runtime failed in {self._graph}: {problem}")

    def record(self) -> str:
        """Record every launch as a CUDA graph; each launch must have run before.

        Returns "", or the reason why a launch cannot be recorded. In that case no launch is
        recorded: a normal run would return the page-locked memory that a recorded one copies from.
        """
        for launch in self._launches:
            try:
                launch.record()
            except BackendError as error:
                self._discard_graphs()
                # the next CUDA call of the library reports the same error once more
                with contextlib.suppress(BackendError):
                    launch()
                return f"{self._graph}: {error}"
        return ""

    def close(self) -> None:
        self._discard_graphs()
        if self._recorded is not None:
            # A waiting run returns the buffers that recorded runs kept. Otherwise a callback of the
            # stream returns them, maybe after the end of the session: it would then free
            # page-locked memory, which is forbidden in a callback and ends the process.
            with contextlib.suppress(BackendError):
                self.run(self._recorded)
        if self.session is not None:
            with contextlib.suppress(BackendError):
                self._cuda.synchronize()  # no buffer may be in use when it is released
        for launch in self._launches:
            launch.release()
        self._launches.clear()
        self._recorded = self.session = None

    def _discard_graphs(self) -> None:
        for launch in self._launches:
            launch.discard_graph()


class OrtCudaLaunch:
    """A session with a bound address for every tensor, or its recorded CUDA graph."""

    def __init__(self, session: OrtCudaSession, cuda: Cuda, binding: Any, keep: object) -> None:
        self._session, self._cuda, self._binding = session, cuda, binding
        self._keep: object = keep  # the binding holds bare addresses of these arrays
        self._graph: Graph | None = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph()
        else:
            self._session.run(self._binding)

    def record(self) -> None:
        """Record the launch as a CUDA graph; it must have run before. Raises BackendError.

        The graph holds addresses of scratch memory that ONNX Runtime returns to the session's
        arena. They stay valid: the arena never returns memory to the device, and all work that
        uses it runs on one stream, in order.
        """
        self._graph = self._cuda.capture(lambda: self._session.run(self._binding, recording=True))

    def discard_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph = None

    def release(self) -> None:
        self.discard_graph()
        self._binding = self._keep = None


class OrtCudaBackend(CudaMemory):
    """Opens graphs with ONNX Runtime on the GPU; all graphs run on one stream.

    A recorded launch returns before its work is done, other launches after it.

    Some nodes of a graph run on the CPU on purpose: `step` computes sizes from the shapes of its
    inputs there. `session.disable_cpu_ep_fallback` would refuse such a graph, so it stays off; a
    session that runs on the CPU altogether is refused in `open`.

    Args:
        ort: the module `onnxruntime` or a stand-in; None imports it.
        cuda: the GPU, owned and closed by the backend; None opens it.
        cuda_graph: record every launch as a CUDA graph, so that one call starts all its kernels.

    Raises BackendError where onnxruntime-gpu, its CUDA provider or cuda-python is missing.
    """

    name = CUDA

    def __init__(
        self, ort: Any = None, cuda: Cuda | None = None, *, cuda_graph: bool = True
    ) -> None:
        self._cuda_graph, self._graphs = cuda_graph, "on" if cuda_graph else "off"
        try:
            self._ort = ort or import_onnxruntime()
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
        # waiting for a stream is forbidden during a capture
        self._waiting, self._recording = (self._run_options(waits) for waits in (True, False))

    def open(self, graph: GraphFile) -> OrtCudaSession:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # for sizes only
        options.enable_cpu_mem_arena = False
        opened = OrtCudaSession(self._cuda, self._waiting, self._recording, graph.ref.name)
        self._sessions.append(opened)
        how: dict[str, Any] = {"providers": [(PROVIDER, self._settings())]}
        if graph.ref.kind == "unconditional":
            # Its keys and values depend on no input. Folded, they would lie in the host's memory,
            # and every launch would copy them, which cannot be recorded.
            how["disabled_optimizers"] = ["ConstantFolding"]
        opened.session = open_session(self._ort, graph, options, **how)
        # where cuDNN or another library is missing, ONNX Runtime goes on without the provider
        if PROVIDER not in opened.session.get_providers():
            raise BackendError(
                f"onnxruntime {self._ort.__version__} does not load its {PROVIDER}: the CUDA "
                "libraries or cuDNN are missing; run "
                f"{pip_command('onnxruntime-gpu[cuda,cudnn]')}"
            )
        return opened

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        """Run the launches until no memory is allocated any more, then record each of them.

        A session that cannot be recorded runs without CUDA graphs; `describe` gives the reason.
        """
        if not self._cuda_graph:
            return launches
        for _ in range(WARM_UPS):
            for launch in launches:
                launch()
        self.synchronize()
        refused = [why for session in self._sessions if (why := session.record())]
        if refused:
            self._graphs = f"on, but not for {'; '.join(refused)}"
        return launches

    def describe(self) -> dict[str, str]:
        device, sm = self._cuda.device_name_and_sm()
        return {
            "backend": self.name,
            "onnxruntime": self._ort.__version__,
            "device": f"{device} (sm{sm})",
            "cuda_graph": self._graphs,
        }

    def close(self) -> None:
        """Close sessions before the memory: they free their memory on its stream."""
        while self._sessions:
            self._sessions.pop().close()
        self._cuda.close()

    def _run_options(self, waits: bool) -> Any:
        options = self._ort.RunOptions()
        options.log_severity_level = SILENT
        key = "disable_synchronize_execution_providers"
        options.add_run_config_entry(key, "0" if waits else "1")
        return options

    def _settings(self) -> dict[str, str]:
        """Options of the CUDA provider, as documented by ONNX Runtime."""
        return {
            "device_id": str(DEVICE),
            "user_compute_stream": str(self._cuda.stream),
            "do_copy_in_default_stream": "1",  # in order with the rest
            # the sampler's sums and the logits are fp32 because they need all of its digits
            "use_tf32": "0",
            # every session has an arena that never returns memory: it should not grow by doubling
            "arena_extend_strategy": "kSameAsRequested",
            # measuring may choose another algorithm the next time, and so another image
            "cudnn_conv_algo_search": "HEURISTIC",
        }


def import_onnxruntime() -> Any:
    """Import ONNX Runtime with the CUDA libraries that pip installed, where there are any.

    Raises BackendError where ONNX Runtime is missing.
    """
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError:
        raise BackendError(f"onnxruntime-gpu is not installed; run {pip_install('gpu')}") from None
    # finds CUDA and cuDNN where pip installed them (from 1.21 on). It prints what it misses; a
    # library that is really needed is reported when a session is made
    if PROVIDER in ort.get_available_providers() and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return ort
