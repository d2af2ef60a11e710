"""The builder half: networks from ONNX, configurations, plans.

A plan is b"FAKEPLAN" and JSON: {"onnx": absolute path, "graph": name, "profiles": [{input: shape}]
(empty for a static graph), "version", "sm"}.

The environment variable FAKE_TENSORRT plants trouble, here and in child processes alike, as
"graph=what": `fail` and `memory` (the builder gives up), `kill` (the process dies as it does when
memory runs out), `interrupt` (Ctrl-C in the middle), `late-interrupt` (when the engine is done),
`interrupt-parent` (in the process above this one).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from enum import IntEnum
from pathlib import Path
from typing import Any

import onnx

__version__ = "10.3.0"
SM = 87
PLAN, CACHE = b"FAKEPLAN", b"FAKECACHE"
PLANT = "FAKE_TENSORRT"
LAST_OPSET = 20
MAX_TOP_K = 3840
REFUSED = {"CumSum", "NonZero", "Multinomial", "Unique", "Attention", "RandomNormalLike"}
# the input that such a node takes as a shape
SHAPE_OPERANDS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Tile": 1, "Slice": 1}
STEPS = 3
CONFIGS: list[IBuilderConfig] = []  # of every build, for tests to look at


class Bound(type):
    """pybind11's classes: a subclass that does not call `__init__` of its base is refused."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not getattr(made, "_bound", False):
            raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
        return made


class ILogger(metaclass=Bound):
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        self._bound = True

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger):
    def __init__(self, min_severity: ILogger.Severity = ILogger.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        if severity <= self.min_severity:
            print(f"[TRT] {msg}")


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    FP16 = 0
    INT8 = 2
    TF32 = 7


class MemoryPoolType(IntEnum):
    WORKSPACE = 0
    TACTIC_DRAM = 4


class ProfilingVerbosity(IntEnum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class IProgressMonitor(metaclass=Bound):
    def __init__(self) -> None:
        self._bound = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_start"')

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::step_complete"')

    def phase_finish(self, phase_name: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_finish"')


class Dims(tuple[int, ...]):
    """A shape; -1 is a size that is not known."""


class ITensor:
    __slots__ = ("_sizes", "is_shape_tensor", "name")

    def __init__(self, name: str, sizes: list[int | str], is_shape_tensor: bool) -> None:
        self.name, self._sizes, self.is_shape_tensor = name, sizes, is_shape_tensor

    @property
    def shape(self) -> Dims:
        return Dims(-1 if isinstance(size, str) else size for size in self._sizes)


class INetworkDefinition:
    __slots__ = ("_inputs", "_onnx", "_outputs", "_strong", "name")

    def __init__(self, strong: bool) -> None:
        self._strong = strong
        self._onnx: Path | None = None
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []
        self.name = ""

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class ParserError:
    def __init__(self, desc: str, node: str = "", operator: str = "") -> None:
        self._desc, self._node, self._operator = desc, node, operator

    def code(self) -> str:
        return "UNSUPPORTED_NODE"

    def desc(self) -> str:
        return self._desc

    def node_name(self) -> str:
        return self._node

    def node_operator(self) -> str:
        return self._operator


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        if not isinstance(network, INetworkDefinition) or not isinstance(logger, ILogger):
            raise TypeError("__init__(): incompatible constructor arguments")
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        try:
            proto = onnx.load(model, load_external_data=False)
        except Exception:
            return self._refuse(ParserError(f"Failed to parse ONNX model: {model}"))
        if proto.opset_import[0].version > LAST_OPSET:
            version = proto.opset_import[0].version
            return self._refuse(ParserError(f"Unsupported ONNX opset version: {version}"))
        graph = proto.graph
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location" and not (Path(model).parent / entry.value).is_file():
                    return self._refuse(ParserError(f"Failed to open file: {entry.value}"))
        for node in graph.node:
            if why := _refusal(node, graph):
                self._refuse(ParserError(why, node.name, node.op_type))
        known = {tensor.name for tensor in graph.initializer}
        shapes = {
            node.input[SHAPE_OPERANDS[node.op_type]]
            for node in graph.node
            if node.op_type in SHAPE_OPERANDS
        }
        network = self._network
        network._inputs = [_tensor(v, v.name in shapes) for v in graph.input if v.name not in known]
        network._outputs = [_tensor(v, False) for v in graph.output]
        network._onnx, network.name = Path(model).absolute(), graph.name
        return not self._errors

    def _refuse(self, error: ParserError) -> bool:
        self._errors.append(error)
        self._logger.log(ILogger.ERROR, f"ModelImporter.cpp: {error.desc()}")
        return False


def _refusal(node: onnx.NodeProto, graph: onnx.GraphProto) -> str | None:
    if node.op_type in REFUSED:
        return (
            f"Plugin not found, are the plugin name, version, and namespace correct? {node.op_type}"
        )
    if node.op_type == "TopK":
        k = next((t for t in graph.initializer if t.name == node.input[1]), None)
        if k is not None and int(onnx.numpy_helper.to_array(k)[0]) > MAX_TOP_K:
            return f"Assertion failed: k <= {MAX_TOP_K}"
    if node.op_type == "Resize" and any(a.name == "antialias" and a.i for a in node.attribute):
        return "Assertion failed: antialias == 0: does not support antialias."
    return None


def _tensor(value: onnx.ValueInfoProto, is_shape: bool) -> ITensor:
    sizes: list[int | str] = [
        d.dim_value if d.HasField("dim_value") else d.dim_param or "?"
        for d in value.type.tensor_type.shape.dim
    ]
    return ITensor(value.name, sizes, is_shape)


class IOptimizationProfile:
    __slots__ = ("_extra", "_shapes")

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Dims, Dims, Dims]] = {}
        self._extra = 1.0

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        low, best, high = Dims(min), Dims(opt), Dims(max)
        ranks = len(low) == len(best) == len(high)
        ordered = all(a <= b <= c for a, b, c in zip(low, best, high, strict=False))
        if not ranks or not ordered or any(n < 0 for n in low):
            raise RuntimeError("Shape provided for max is inconsistent with other shapes.")
        self._shapes[input] = (low, best, high)

    def get_shape(self, input: str) -> list[Dims]:
        return list(self._shapes.get(input, ()))

    @property
    def extra_memory_target(self) -> float:
        return self._extra

    @extra_memory_target.setter
    def extra_memory_target(self, value: float) -> None:
        self._extra = value if 0 <= value <= 1 else self._extra

    def __bool__(self) -> bool:
        return True


class ITimingCache:
    """What was measured: a list of graphs, and for which device."""

    def __init__(self, graphs: list[str], sm: int) -> None:
        self._graphs, self._sm = graphs, sm

    def serialize(self) -> memoryview:
        return memoryview(CACHE + json.dumps({"graphs": self._graphs, "sm": self._sm}).encode())


class IBuilderConfig:
    __slots__ = (
        "_cache",
        "_flags",
        "_limits",
        "_logger",
        "_profiles",
        "builder_optimization_level",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._flags = {BuilderFlag.TF32}
        self._limits: dict[MemoryPoolType, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self.builder_optimization_level = 3
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: IProgressMonitor | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._limits[pool] = pool_size

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return self._limits.get(pool, 1 << 33)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if not serialized_timing_cache:
            return ITimingCache([], SM)
        if not serialized_timing_cache.startswith(CACHE):
            self._logger.log(
                ILogger.ERROR,
                "Error Code 1: Serialization (Serialization assertion magicTagRead == kMAGIC_TAG "
                "failed.Magic tag does not match)",
            )
            return None
        data = json.loads(serialized_timing_cache[len(CACHE) :])
        return ITimingCache(data["graphs"], data["sm"])

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._sm != SM and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if not isinstance(logger, ILogger):
            raise TypeError("__init__(): incompatible constructor arguments")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition | None:
        if flags >> len(NetworkDefinitionCreationFlag):
            return None
        return INetworkDefinition(bool(flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> memoryview | None:
        """IHostMemory is a buffer and little else, as a memoryview is."""
        assert network._onnx is not None
        CONFIGS.append(config)
        planted = dict(p.split("=") for p in os.environ.get(PLANT, "").split(",") if p)
        trouble = planted.get(network._onnx.stem, "")
        if why := self._refusal(network, config):
            return self._give_up(why)
        if not _report(config.progress_monitor, trouble):
            return self._give_up("Error Code 9: the build was cancelled by the progress monitor")
        if trouble == "fail":
            return self._give_up(
                "[optimizer.cpp::computeCosts::4048] Error Code 10: Internal Error (Could not "
                "find any implementation for node {ForeignNode[decoder.mid/Conv_9]}.)"
            )
        if trouble == "memory":
            return self._give_up("[virtualMemoryBuffer.cpp::resizePhysical] OutOfMemory (no words)")
        if config._cache is not None and network.name not in config._cache._graphs:
            config._cache._graphs.append(network.name)
        plan = {
            "onnx": str(network._onnx),
            "graph": network.name,
            "profiles": [
                {
                    tensor.name: list((profile.get_shape(tensor.name) or [tensor.shape])[0])
                    for tensor in network._inputs
                }
                for profile in config._profiles
            ],
            "version": __version__,
            "sm": self._sm(config),
        }
        return memoryview(PLAN + json.dumps(plan).encode())

    def _sm(self, config: IBuilderConfig) -> int:
        return SM

    def _give_up(self, words: str) -> None:
        self._logger.log(ILogger.ERROR, words)
        self._logger.log(ILogger.ERROR, "IBuilder::buildSerializedNetwork: Error Code 4: API Usage")

    def _refusal(self, network: INetworkDefinition, config: IBuilderConfig) -> str | None:
        if not network._strong:
            return "Error Code 4: the network has FP16 tensors, but it is not strongly typed"
        dynamic = [t for t in network._inputs if -1 in t.shape]
        if dynamic and not config._profiles:
            return (
                "Error Code 4: Internal Error (Network has dynamic or shape inputs, but no "
                "optimization profile has been defined.)"
            )
        for number, profile in enumerate(config._profiles):
            sizes: dict[str, int] = {}
            for tensor in dynamic:
                shapes = profile.get_shape(tensor.name)
                if not shapes:
                    return f"{tensor.name}: dynamic input is missing dimensions in profile {number}"
                low, _, high = shapes
                if len(low) != len(tensor._sizes) or 0 in low:
                    return f"{tensor.name}: profile {number} has the dimensions {tuple(low)}"
                for size, least, most in zip(tensor._sizes, low, high, strict=True):
                    same = sizes.setdefault(size, most) if isinstance(size, str) else size
                    if not least == most == same:
                        return f"{tensor.name}: {size} is {same}, but {most} in profile {number}"
        return None


def _report(monitor: IProgressMonitor | None, trouble: str) -> bool:
    """Two nested phases; False where the monitor stops the build."""
    root, inner = "Building Engine", "Timing graph nodes"
    if trouble == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if monitor is None:
        return True
    monitor.phase_start(root, None, STEPS)
    go_on = True
    for step in range(STEPS):
        monitor.phase_start(inner, root, STEPS)
        for n in range(STEPS):
            go_on = go_on and _complete(monitor, inner, n)
        monitor.phase_finish(inner)
        if step == 1 and trouble.startswith("interrupt"):
            os.kill(os.getppid() if trouble == "interrupt-parent" else os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 20  # TensorRT is busy; the press is for it to notice
            while go_on and time.monotonic() < deadline:
                time.sleep(0.01)
                go_on = _complete(monitor, inner, 0)
        go_on = go_on and _complete(monitor, root, step)
    monitor.phase_finish(root)
    if trouble == "late-interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    return go_on


def _complete(monitor: IProgressMonitor, phase: str, step: int) -> bool:
    try:
        return monitor.step_complete(phase, step)
    except Exception as error:
        print(f"[ERROR] Exception caught in step_complete(): {error}", file=sys.stderr)
        return False


def rtx_module() -> types.ModuleType:
    """What `tensorrt_rtx` 1.7 has instead: compute capabilities, no timing cache, other bits."""

    class RtxFlag(IntEnum):
        STRONGLY_TYPED = 0

    class RtxBuilderFlag(IntEnum):
        TF32 = 7
        REQUIRE_USER_ALLOCATION = 20

    class ComputeCapability(IntEnum):
        NONE = 0
        CURRENT = 1
        SM75 = 75
        SM86 = 86
        SM89 = 89
        SM120 = 120

    class RtxConfig(IBuilderConfig):
        __slots__ = ("_capabilities", "num_compute_capabilities")

        def __init__(self, logger: ILogger) -> None:
            super().__init__(logger)
            self.num_compute_capabilities = 0
            self._capabilities: list[ComputeCapability] = []

        def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
            if index >= self.num_compute_capabilities:
                return False
            self._capabilities.append(compute_capability)
            return True

        def create_timing_cache(self, serialized_timing_cache: bytes) -> None:
            raise AssertionError("a timing cache makes TensorRT for RTX look for a GPU")

    class RtxBuilder(Builder):
        def create_network(self, flags: int = 0) -> INetworkDefinition | None:
            return INetworkDefinition(True) if flags in (0, 1) else None

        def create_builder_config(self) -> IBuilderConfig:
            return RtxConfig(self._logger)

        def _sm(self, config: IBuilderConfig) -> int:
            assert isinstance(config, RtxConfig)
            return int(config._capabilities[0])

    module = types.ModuleType("tensorrt_rtx")
    for name in ("ILogger", "IProgressMonitor", "MemoryPoolType", "OnnxParser"):
        setattr(module, name, globals()[name])
    vars(module).update(
        __version__="1.7.0",
        Builder=RtxBuilder,
        BuilderFlag=RtxBuilderFlag,
        ComputeCapability=ComputeCapability,
        NetworkDefinitionCreationFlag=RtxFlag,
        ProfilingVerbosity=ProfilingVerbosity,
    )
    return module
