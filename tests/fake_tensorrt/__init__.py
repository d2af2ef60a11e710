"""Stands for the module `tensorrt` 10.3 where there is none: what the real one refuses, this one
refuses, and it has no method that the real one lacks. `cudart` stands for `cuda.bindings.runtime`.
"""

from fake_tensorrt.builder import (
    Builder,
    BuilderFlag,
    IBuilderConfig,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    IProgressMonitor,
    ITimingCache,
    Logger,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParser,
    ProfilingVerbosity,
    __version__,
)
from fake_tensorrt.engine import (
    DataType,
    ExecutionContextAllocationStrategy,
    ICudaEngine,
    IExecutionContext,
    Runtime,
    TensorIOMode,
    TensorLocation,
)

__all__ = [
    "Builder",
    "BuilderFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITimingCache",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ProfilingVerbosity",
    "Runtime",
    "TensorIOMode",
    "TensorLocation",
    "__version__",
]
