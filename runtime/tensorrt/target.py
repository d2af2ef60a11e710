"""The target of an engine (library, device, precision) and its build options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from var_deploy.errors import UsageError

ANY_DEVICE = "any"  # engines of tensorrt_rtx are tied to a compute capability, not to a GPU


@dataclass(frozen=True, kw_only=True)
class Target:
    """The library, device and precision that an engine is built for.

    Attributes:
        library: "tensorrt" or "tensorrt_rtx".
        version: version of the library.
        device: name of the GPU, or "any".
        sm: compute capability, 87 for 8.7.
        precision: precision of the graphs, "fp16" or "fp32".
    """

    library: str
    version: str
    device: str
    sm: int
    precision: str

    @property
    def folder(self) -> str:
        """Name of the target's folder under engines/."""
        return f"{self.library}-{self.version}-sm{self.sm}-{self.precision}"

    def describe(self) -> str:
        """The target in words, for messages."""
        device = "any GPU" if self.device == ANY_DEVICE else self.device
        return f"{self.library} {self.version} on {device} (sm{self.sm}), {self.precision}"

    def serves(self, wanted: Target) -> bool:
        """Whether an engine built for this target runs on the target `wanted`."""
        device = wanted.device if self.device == ANY_DEVICE else self.device
        return dataclasses.replace(self, device=device) == wanted


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Build options that change an engine.

    Attributes:
        workspace_mb: most memory that a layer may use for itself, in MiB; None leaves the limit
            to TensorRT (all of the device).
        optimization_level: 0 (quickest build) … 5 (longest search).
        compute_capability: what tensorrt_rtx compiles for, 86 for 8.6; None with `tensorrt`,
            which builds for the device it runs on.

    Raises UsageError for a value out of range.
    """

    workspace_mb: int | None = None
    optimization_level: int = 3
    compute_capability: int | None = None

    def __post_init__(self) -> None:
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise UsageError(f"workspace must be at least 1 MB, found {self.workspace_mb}")
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(
                f"optimization level must lie between 0 and 5, found {self.optimization_level}"
            )
