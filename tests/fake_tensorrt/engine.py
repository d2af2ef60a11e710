"""The runtime half: engines, execution contexts.

An engine computes with ONNX Runtime on the CPU, with arrays that lie in the device memory of
`cudart`. Refusals are TensorRT's: None or False and a line in the log, with its wording where it is
known. Where the real one has no defence (overlapping outputs, memory that was freed, a graph that
outlives its context) an AssertionError is raised.
"""

from __future__ import annotations

import functools
import json
import weakref
from enum import IntEnum
from math import prod
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fake_tensorrt import cudart
from fake_tensorrt.builder import PLAN, Dims, ILogger, __version__

ADDRESS_ALIGNMENT = 256
MEMORY_ALIGNMENT = 512  # of a context's device memory
Shape = tuple[int, ...]
USAGE = "Error Code 3: API Usage Error (Parameter check failed, "


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(IntEnum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    """tensorrt_rtx alone."""

    LAZY = 0
    EAGER = 1
    NONE = 2


TYPES = {
    "tensor(float)": (DataType.FLOAT, np.dtype(np.float32)),
    "tensor(float16)": (DataType.HALF, np.dtype(np.float16)),
    "tensor(int64)": (DataType.INT64, np.dtype(np.int64)),
    "tensor(int32)": (DataType.INT32, np.dtype(np.int32)),
    "tensor(bool)": (DataType.BOOL, np.dtype(np.bool_)),
}


class Runtime(cudart.Counted):
    def __init__(self, logger: ILogger) -> None:
        if not isinstance(logger, ILogger):
            raise TypeError("__init__(): incompatible constructor arguments")
        if cudart.planted("Runtime"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        super().__init__("runtime")
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        data = bytes(serialized_engine)
        if cudart.planted("deserialize_cuda_engine"):
            return self._refuse("Error Code 2: OutOfMemory (Requested size was 1024 bytes.)")
        if not data.startswith(PLAN):
            return self._refuse(
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization "
                "assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match)"
            )
        plan = json.loads(data[len(PLAN) :])
        if plan["version"] != __version__:
            return self._refuse(
                "The engine plan file is not compatible with this version of TensorRT, expecting "
                f"library version {__version__} got {plan['version']}, please rebuild."
            )
        _, major, minor = cudart._state.device
        if plan["sm"] != 10 * major + minor:
            return self._refuse(
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{major}.{minor} got compute {plan['sm'] / 10}, please rebuild."
            )
        return self._engine(plan)

    def _engine(self, plan: dict[str, Any]) -> ICudaEngine:
        return ICudaEngine(self, plan)

    def _refuse(self, words: str) -> None:
        self.logger.log(ILogger.ERROR, words)


class Model:
    """An ONNX file in ONNX Runtime; made once, since tests make many engines of it."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self._shapes: dict[str, dict[str, Shape]] = {}

    def shapes(self, profile: dict[str, Shape]) -> dict[str, Shape]:
        """Of every tensor, those of outputs by a run on ones."""
        key = str(profile)
        if key not in self._shapes:
            shapes = {name: tuple(value.shape) for name, value in self.inputs.items()} | profile
            feed = {
                name: np.ones(shapes[name], TYPES[value.type][1])
                for name, value in self.inputs.items()
            }
            found = (array.shape for array in self.session.run(list(self.outputs), feed))
            self._shapes[key] = shapes | dict(zip(self.outputs, found, strict=True))
        return self._shapes[key]


load_model = functools.cache(Model)


class ICudaEngine(cudart.Counted):
    """Keeps its runtime alive, as the real one does."""

    def __init__(self, runtime: Runtime, plan: dict[str, Any]) -> None:
        super().__init__("engine")
        self._runtime, self._logger, self.name = runtime, runtime.logger, plan["graph"]
        self._profiles = [
            {name: tuple(shape) for name, shape in profile.items()} for profile in plan["profiles"]
        ]
        self._model = load_model(plan["onnx"])
        self._inputs, self._outputs = self._model.inputs, self._model.outputs
        self._values = {**self._inputs, **self._outputs}
        self._names = list(self._values)
        # tests may say that TensorRT wants some of them on the host
        self._on_host: set[str] = set(plan.get("host", ()))

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        return max(len(self._profiles), 1)

    @property
    def device_memory_size_v2(self) -> int:
        profiles = range(self.num_optimization_profiles)
        return max(self.get_device_memory_size_for_profile_v2(i) for i in profiles)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 1024 * (profile_index + 1) + 256 * len(self.name)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        if name in self._inputs:
            return TensorIOMode.INPUT
        return TensorIOMode.OUTPUT if name in self._outputs else TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self._values[name].type][0]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._on_host else TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(-1 if isinstance(n, str) else n for n in self._values[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if not 0 <= profile_index < self.num_optimization_profiles:
            return [Dims((-1,))] * 3
        if not self._profiles:
            return [self.get_tensor_shape(name)] * 3
        return [Dims(self._profiles[profile_index][name])] * 3

    def create_execution_context(
        self,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> IExecutionContext | None:
        if not isinstance(strategy, ExecutionContextAllocationStrategy):
            raise TypeError("create_execution_context(): incompatible function arguments")
        return self._context(strategy)

    def _context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext | None:
        if cudart.planted("create_execution_context"):
            self._logger.log(ILogger.ERROR, "Error Code 2: OutOfMemory (no further information)")
            return None
        return IExecutionContext(self, strategy)

    def _shapes_of(self, profile: int) -> dict[str, Shape]:
        return self._model.shapes(self._profiles[profile] if self._profiles else {})


class IExecutionContext(cudart.Counted):
    """Keeps its engine alive, as the real one does."""

    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        super().__init__("execution context")
        self.engine, self._strategy = engine, strategy
        self._profile, self._profile_was_set = 0, False
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._warm = False

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        valid = 0 <= profile_index < self.engine.num_optimization_profiles
        if cudart.planted("set_optimization_profile_async") or not valid:
            self._log(f"{USAGE}condition: profileIndex >= 0 && profileIndex < nbProfiles.)")
            raise RuntimeError("Error in set optimization profile async.")
        if self._profile_was_set and profile_index != self._profile:
            raise AssertionError("a context that changes its profile has crashed CUDA graphs")
        cudart.enqueue(stream_handle, lambda: None)
        self._profile, self._profile_was_set = profile_index, True
        self._shapes.clear()
        self._warm = False
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if cudart.planted("set_input_shape"):
            return self._refuse("setInputShape: Error Code 1: Internal Error (planted)")
        engine = self.engine
        if name not in engine._inputs:
            return self._refuse(f"setInputShape: {USAGE}{name} is not an input.)")
        low, _, high = engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(low) or not all(
            a <= n <= b for a, n, b in zip(low, shape, high, strict=True)
        ):
            return self._refuse(
                f"setInputShape: {USAGE}condition: satisfyProfile. Set dimension {list(shape)} for "
                f"tensor {name} does not satisfy any optimization profiles. Valid range for "
                f"profile {self._profile}: {list(low)}..{list(high)}.)"
            )
        self._shapes[name] = tuple(shape)
        self._warm = False
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        """-1 until every input has its shape."""
        if self._missing():
            return self.engine.get_tensor_shape(name)
        return Dims(self.engine._shapes_of(self._profile)[name])

    def infer_shapes(self) -> list[str]:
        if cudart.planted("infer_shapes"):
            self._log("IExecutionContext::inferShapes: Error Code 1: Internal Error (planted)")
            raise RuntimeError("infer_shapes error code: -1")
        return self._missing()

    def _missing(self) -> list[str]:
        engine = self.engine
        missing = [
            name
            for name in engine._inputs
            if -1 in engine.get_tensor_shape(name) and name not in self._shapes
        ]
        return [*missing, *sorted(engine._on_host - set(self._addresses))]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if cudart.planted("set_tensor_address"):
            return self._refuse("setTensorAddress: Error Code 1: Internal Error (planted)")
        if name not in self.engine._values:
            return self._refuse(f"setTensorAddress: {USAGE}{name} is not an I/O tensor.)")
        if memory % ADDRESS_ALIGNMENT:
            return self._refuse(
                f"setTensorAddress: {USAGE}condition: memory % 256 == 0. The address of {name} "
                "must be aligned on 256 byte boundary.)"
            )
        self._addresses[name] = memory
        self._warm = False
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        needed = self.engine.device_memory_size_v2
        if cudart.planted("set_device_memory"):
            self._refuse("setDeviceMemory: Error Code 1: Internal Error (planted)")
        elif memory % MEMORY_ALIGNMENT:
            self._refuse(
                f"setDeviceMemory: {USAGE}condition: reinterpret_cast<uintptr_t>(memory) % "
                "requiredAlignment == 0U. setDeviceMemory: memory must be aligned on 512 byte "
                "boundary.)"
            )
        elif size < needed:
            self._refuse(f"setDeviceMemoryV2: {USAGE}{size} bytes, {needed} are required.)")
        else:
            self._memory = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        if cudart.planted("execute_async_v3"):
            return self._refuse("enqueueV3: Error Code 1: Cuda Runtime (unknown error)")
        engine, recording = self.engine, cudart.capturing(stream_handle)
        if recording and not self._warm:
            cudart.spoil(stream_handle)
            return self._refuse(
                "enqueueV3: Error Code 1: Cuda Runtime (operation not permitted when stream is "
                "capturing)"
            )
        if missing := self._missing():
            return self._refuse(
                f"enqueueV3: {USAGE}condition: allInputDimensionsSpecified(0). The shape of "
                f"{missing[0]} is not set.)"
            )
        for name in engine._values:
            if not self._addresses.get(name):
                kind = "input" if name in engine._inputs else "output"
                return self._refuse(
                    f"enqueueV3: {USAGE}condition: mContext.profileObliviousBindings.at("
                    f"profileObliviousIndex) != nullptr. Address is not set for {kind} tensor "
                    f"{name}. Call set{kind.capitalize()}TensorAddress or setTensorAddress before "
                    "enqueue/execute.)"
                )
        managed = self._strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        if managed and self._memory is None:
            return self._refuse(f"enqueueV3: {USAGE}condition: mContext.deviceMemory != nullptr.)")
        self._check_ranges()
        cudart.enqueue(stream_handle, _Run(self))
        self._warm = True
        return True

    def _ranges(self) -> list[tuple[str, int, int]]:
        """Every tensor's name, address and bytes."""
        shapes, values = self.engine._shapes_of(self._profile), self.engine._values
        return [
            (name, address, prod(shapes[name]) * TYPES[values[name].type][1].itemsize)
            for name, address in self._addresses.items()
        ]

    def _check_ranges(self) -> None:
        """TensorRT keeps intermediate results in the memory of outputs, and reads inputs when it
        likes: what it writes may overlap nothing else."""
        ranges = [*self._ranges(), *([("scratch", *self._memory)] if self._memory else ())]
        for name, start, size in ranges:
            cudart.view(start, size)
            for other, begin, length in ranges:
                written = name in self.engine._outputs or name == "scratch"
                if written and other != name and start < begin + length and begin < start + size:
                    raise AssertionError(f"{self.engine.name}: {name} overlaps {other}")

    def _refuse(self, words: str) -> bool:
        self._log(f"IExecutionContext::{words}")
        return False

    def _log(self, words: str) -> None:
        self.engine._logger.log(ILogger.ERROR, words)


class _Run:
    """One execution as it was set up when it was enqueued, or recorded."""

    def __init__(self, context: IExecutionContext) -> None:
        self._context = weakref.ref(context)
        self._ranges, self._memory = context._ranges(), context._memory

    def __call__(self) -> None:
        context = self._context()
        if context is None:
            raise AssertionError("an execution context was released before its work was done")
        engine, shapes = context.engine, context.engine._shapes_of(context._profile)
        feed: dict[str, NDArray[Any]] = {}
        places: dict[str, NDArray[Any]] = {}
        for name, address, size in self._ranges:
            dtype = TYPES[engine._values[name].type][1]
            raw = cudart.view(address, size)
            array = raw.view(dtype).reshape(shapes[name])
            if name in engine._inputs:
                feed[name] = array.copy()
            else:
                places[name] = array
                raw[...] = cudart.GARBAGE
        for name, array in zip(places, engine._model.session.run(list(places), feed), strict=True):
            places[name][...] = array
        if self._memory is not None:
            cudart.view(*self._memory)[...] = cudart.GARBAGE


class IRuntimeConfig:
    """tensorrt_rtx alone."""

    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = (
            DynamicShapesKernelSpecializationStrategy.LAZY
        )

    def set_execution_context_allocation_strategy(
        self,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> None:
        self._strategy = strategy


class RtxRuntime(Runtime):
    """`tensorrt_rtx.Runtime`."""

    def _engine(self, plan: dict[str, Any]) -> ICudaEngine:
        return RtxEngine(self, plan)


class RtxEngine(ICudaEngine):
    """`tensorrt_rtx.ICudaEngine`; a captured context must not wait for its kernels."""

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: Any = None) -> IExecutionContext | None:
        if not isinstance(runtime_config, IRuntimeConfig):
            return super().create_execution_context(runtime_config)
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        if runtime_config.dynamic_shapes_kernel_specialization_strategy != eager:
            raise AssertionError("a graph would record the fallback kernels")
        return self._context(runtime_config._strategy)
