"""The TensorRT backend: runs engines, with one execution context per launch.

All time and memory for set-up is spent before the first image. Contexts allocate no memory: they
run one after the other, so they share one scratch buffer of the largest size. A context uses one
optimisation profile throughout. TensorRT before 10.8 has an accuracy bug with several profiles in
an engine: with such a version, compare the shared layout with the per-scale one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from var_deploy.bundle.files import GraphFile
from var_deploy.errors import BackendError, one_line
from var_deploy.runtime.backends.cuda import Cuda, CudaMemory, Graph
from var_deploy.runtime.backends.protocol import ALIGNMENT, Array, Arrays, Launch
from var_deploy.runtime.blocks import pack
from var_deploy.runtime.tensorrt.library import Library

DTYPES: Mapping[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
}
AGAIN = "run var-deploy build again"


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """An input or output of an engine; a size of -1 depends on the optimisation profile."""

    name: str
    kind: str  # name of its TensorRT data type
    shape: tuple[int, ...]

    @property
    def open(self) -> bool:
        return -1 in self.shape


class TensorRtBackend(CudaMemory):
    """Opens and runs TensorRT engines on the GPU of `cuda`.

    Args:
        plans: graph name → checked bytes of its engine; raises BackendError.
        cuda: the GPU, owned and closed by the backend.
        cuda_graph: record every launch as a CUDA graph, so that one call starts all its kernels.
    """

    def __init__(
        self,
        library: Library,
        plans: Callable[[str], bytes],
        *,
        cuda: Cuda,
        cuda_graph: bool = True,
    ) -> None:
        super().__init__(cuda)
        self._library, self._plans, self._cuda_graph = library, plans, cuda_graph
        self._runtime: Any = None
        self._sessions: list[TrtSession] = []

    @property
    def name(self) -> str:
        return self._library.name

    def open(self, graph: GraphFile) -> TrtSession:
        """Load the engine of a graph; the ONNX file itself is not read."""
        if self._runtime is None:
            self._start()
        session = TrtSession(self._library, self._cuda, graph.ref.name)
        self._sessions.append(session)
        session.load(self._runtime, self._plans(graph.ref.name))
        return session

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        """Give all contexts their scratch memory, run each launch once, then record it.

        The first run of a context does initialisation that is forbidden in a capture, so the inputs
        must hold valid values.
        """
        bound = [launch for session in self._sessions for launch in session.launches]
        scratch = self.allocate(max((launch.scratch_size for launch in bound), default=0))
        spare = self.allocate(max((launch.spare_size for launch in bound), default=0))
        for launch in bound:
            launch.attach(scratch, spare)
        for ready in launches:
            ready()
        self.synchronize()
        if self._cuda_graph:
            for ready in launches:
                assert isinstance(ready, TrtLaunch)  # they come from `bind`
                ready.record()
        return launches

    def describe(self) -> dict[str, str]:
        device, sm = self._cuda.device_name_and_sm()
        return {
            "backend": self.name,
            self.name: self._library.version,
            "device": f"{device} (sm{sm})",
            "cuda_graph": "on" if self._cuda_graph else "off",
        }

    def close(self) -> None:
        """Release CUDA graphs, contexts, engines, the runtime and the memory, in this order."""
        while self._sessions:
            self._sessions.pop().close()
        self._runtime = None
        self._cuda.close()

    def _start(self) -> None:
        library = self._library
        library.logger.clear()
        try:
            self._runtime = library.module.Runtime(library.logger)
        except Exception as error:  # what pybind11 raises for a null pointer
            words = f"{library.words()} ({one_line(error)})"
            raise BackendError(f"{library.name} cannot run on this machine: {words}") from None


class TrtSession:
    """One loaded engine and the launches (execution contexts) that were made from it."""

    def __init__(self, library: Library, cuda: Cuda, graph: str) -> None:
        self.library, self.cuda, self.graph = library, cuda, graph
        self.launches: list[TrtLaunch] = []
        self.inputs: dict[str, EngineTensor] = {}
        self.outputs: dict[str, EngineTensor] = {}
        self.engine: Any = None

    def load(self, runtime: Any, plan: bytes) -> None:
        """Deserialize a plan. Raises BackendError where TensorRT refuses it."""
        self.library.logger.clear()
        self.engine = runtime.deserialize_cuda_engine(plan)
        del runtime, plan  # the traceback of what is raised below would keep them
        if self.engine is None:
            raise BackendError(
                f"{self.title} does not load the engine of {self.graph}: {self.library.words()}; "
                f"{AGAIN}"
            )
        for number in range(self.engine.num_io_tensors):
            self._add(self.engine.get_tensor_name(number))

    @property
    def title(self) -> str:
        return f"{self.library.name} {self.library.version}"

    def bind(self, inputs: Arrays, outputs: Arrays) -> TrtLaunch:
        launch = TrtLaunch(self)
        self.launches.append(launch)  # first, so that `close` releases it if binding fails
        launch.bind(inputs, outputs)
        return launch

    def close(self) -> None:
        if self.engine is None:
            return
        with contextlib.suppress(BackendError):
            self.cuda.synchronize()  # nothing may run when it is released
        while self.launches:
            self.launches.pop().release()
        self.engine = None

    def profile_shapes(self, name: str, profile: int) -> set[tuple[int, ...]]:
        """Minimum, optimum and maximum shape of an input; one shape, as profiles are static."""
        return {tuple(shape) for shape in self.engine.get_tensor_profile_shape(name, profile)}

    def fail(self, what: str) -> BackendError:
        """A BackendError with `what` failed and TensorRT's errors."""
        return BackendError(f"{self.title} {what}: {self.library.words()}")

    def _add(self, name: str) -> None:
        trt = self.library.module
        if self.engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise BackendError(
                f"the engine of {self.graph} wants {name} in the host's memory, where nothing of "
                f"a graph lies; export the bundle and {AGAIN}"
            )
        tensor = EngineTensor(
            name=name,
            kind=self.engine.get_tensor_dtype(name).name,
            shape=tuple(self.engine.get_tensor_shape(name)),
        )
        is_input = self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (self.inputs if is_input else self.outputs)[name] = tensor


class TrtLaunch:
    """An execution context with a bound address for every tensor, or its recorded CUDA graph.

    Outputs that are not stored get spare memory, each its own, since later layers of the engine may
    read them. Outputs whose buffers are not aligned (cache rows whose bytes are not a multiple of
    256) are written to spare memory too, and copied afterwards. All launches share spare memory.

    Attributes:
        scratch_size: bytes of scratch memory that the engine needs.
        spare_size: bytes of the outputs in spare memory.
    """

    def __init__(self, session: TrtSession) -> None:
        self._session, self._cuda = session, session.cuda
        self._context: Any = None  # the only reference, so that `release` frees it
        self._graph: Graph | None = None
        self._spare: dict[str, int] = {}  # output → its offset in the spare memory
        self._places: dict[str, Array] = {}  # output in spare memory → its buffer
        self._copies: list[tuple[int, int, int]] = []  # target, source, bytes
        self._keep: object = None
        self.scratch_size = self.spare_size = 0

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        session = self._session
        session.library.logger.clear()
        self._check_names(inputs, outputs)
        self._context = self._new_context()
        if self._context is None:
            raise session.fail(f"made no execution context for {session.graph}")
        self._set_shapes(inputs)
        for name, tensor in session.inputs.items():
            array = inputs[name]
            self._check(tensor, array)
            if array.address % ALIGNMENT:
                raise BackendError(
                    f"{session.graph}: the input {name} lies at {array.address:#x}, which is not "
                    f"a multiple of {ALIGNMENT}"
                )
            self._set_address(name, array.address)
        self._place_outputs(outputs)
        self._keep = inputs, outputs  # the context holds bare addresses of these arrays
        self.scratch_size = int(session.engine.device_memory_size_v2)

    def attach(self, scratch: Array, spare: Array) -> None:
        """Set the scratch and spare memory, which all launches share."""
        session = self._session
        session.library.logger.clear()
        self._context.set_device_memory(scratch.address, scratch.nbytes)
        if session.library.logger.errors():  # the call returns nothing
            raise session.fail(f"does not take the scratch memory of {session.graph}")
        for name, offset in self._spare.items():
            self._set_address(name, spare.address + offset)
        self._copies = [
            (place.address, spare.address + self._spare[name], place.nbytes)
            for name, place in self._places.items()
        ]

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph()
            return
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._session.fail(f"failed in {self._session.graph}")
        for target, source, size in self._copies:
            self._cuda.copy(target, source, size)

    def record(self) -> None:
        """Record the launch as a CUDA graph; it must have run once. Raises BackendError."""
        if self._graph is not None:
            return
        try:
            self._graph = self._cuda.capture(self)
        except BackendError as error:
            raise BackendError(
                f"{self._session.graph} cannot be recorded as a CUDA graph ({error}); "
                "run it with --no-cuda-graph"
            ) from None

    def release(self) -> None:
        """Release the CUDA graph, then the context whose kernels it launches."""
        if self._graph is not None:
            self._graph.close()
        self._graph = self._context = self._keep = None

    def _new_context(self) -> Any:
        session = self._session
        trt = session.library.module
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not session.library.is_rtx:
            return session.engine.create_execution_context(managed)
        config = session.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        # lazily, a CUDA graph would record the fallback kernels that run until these are compiled
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        return session.engine.create_execution_context(config)

    def _check_names(self, inputs: Arrays, outputs: Arrays) -> None:
        session = self._session
        for kind, wanted, there in (
            ("input", session.inputs, inputs),
            # an input that the engine does not read is allowed, an output that it lacks is not
            ("output", outputs, session.outputs),
        ):
            for name in wanted:
                if name not in there:
                    lacking = "the bundle" if kind == "input" else "the engine"
                    raise BackendError(
                        f"{session.graph}: the {kind} {name} is missing in {lacking}; {AGAIN}"
                    )

    def _set_shapes(self, inputs: Arrays) -> None:
        """Select the profile that was built for these inputs, and set their shapes."""
        session, graph = self._session, self._session.graph
        varying = [tensor.name for tensor in session.inputs.values() if tensor.open]
        if varying:
            profile, stream = self._profile(varying, inputs), self._cuda.stream
            if not _asked(lambda: self._context.set_optimization_profile_async(profile, stream)):
                raise session.fail(f"does not take profile {profile} of {graph}")
        for name in varying:
            if not self._context.set_input_shape(name, inputs[name].shape):
                raise session.fail(f"does not take the shape of the input {name} of {graph}")
        missing = _asked(lambda: self._context.infer_shapes())
        if missing or missing is None:
            raise session.fail(f"lacks the shape of {', '.join(missing or varying)} in {graph}")

    def _profile(self, varying: Sequence[str], inputs: Arrays) -> int:
        session = self._session
        count = session.engine.num_optimization_profiles
        for number in range(count):
            if all(session.profile_shapes(n, number) == {inputs[n].shape} for n in varying):
                return number
        shapes = ", ".join(f"{name} {list(inputs[name].shape)}" for name in varying[:4])
        raise BackendError(
            f"{session.graph}: none of the engine's {count} profiles is for {shapes}; {AGAIN}"
        )

    def _place_outputs(self, outputs: Arrays) -> None:
        homeless: dict[str, tuple[tuple[int, ...], DTypeLike]] = {}
        for name, tensor in self._session.outputs.items():
            array = outputs.get(name)
            if array is not None:
                self._check(tensor, array)
            if array is not None and array.address % ALIGNMENT == 0:
                self._set_address(name, array.address)
            else:
                homeless[name] = self._shape(tensor), self._dtype(tensor)
        self._spare, self.spare_size = pack(homeless)
        self._places = {name: outputs[name] for name in homeless if name in outputs}

    def _shape(self, tensor: EngineTensor) -> tuple[int, ...]:
        """Shape of an output in the selected profile."""
        shape = tuple(self._context.get_tensor_shape(tensor.name))
        if min(shape, default=1) < 0:
            raise BackendError(
                f"{self._session.graph}: TensorRT cannot say the shape of {tensor.name} before it "
                f"is computed; export the bundle and {AGAIN}"
            )
        return shape

    def _dtype(self, tensor: EngineTensor) -> np.dtype[Any]:
        if tensor.kind not in DTYPES:
            raise BackendError(
                f"{self._session.graph}: {tensor.name} is {tensor.kind} in the engine, which no "
                f"graph of a bundle has; {AGAIN}"
            )
        return DTYPES[tensor.kind]

    def _check(self, tensor: EngineTensor, array: Array) -> None:
        dtype, shape = self._dtype(tensor), self._shape(tensor)
        if (array.dtype, array.shape) != (dtype, shape):
            raise BackendError(
                f"{self._session.graph}: {tensor.name} is {dtype} {list(shape)} in the engine and "
                f"{array.dtype} {list(array.shape)} in the bundle; {AGAIN}"
            )

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            graph = self._session.graph
            raise self._session.fail(f"does not take the address of {name} in {graph}")


def _asked(question: Callable[[], Any]) -> Any:
    """Return TensorRT's answer, None where the call fails by raising RuntimeError.

    The exception is dropped, since its traceback may hold objects that have to be released.
    """
    try:
        return question()
    except RuntimeError:
        return None
