"""Deploys VAR image generators (next-scale prediction, arXiv 2404.02905).

    from var_deploy import Pipeline

    with Pipeline.load("build/pocket") as pipe:
        images = pipe.generate(["star", 3], seed=7)  # uint8 [2, H, W, 3]

Importing this package does no work: `Pipeline` is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from var_deploy.errors import (
    BackendError,
    BundleError,
    CancelledError,
    CheckpointError,
    ExportError,
    LabelError,
    UnchangedError,
    UsageError,
    VarDeployError,
    VerificationError,
)

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "ExportError",
    "LabelError",
    "Pipeline",
    "UnchangedError",
    "UsageError",
    "VarDeployError",
    "VerificationError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        try:
            from var_deploy.pipeline import Pipeline
        except ModuleNotFoundError as error:
            from var_deploy.host.installation import shadowed

            if not (reason := shadowed(error)):
                raise
            raise ModuleNotFoundError(reason, name=error.name) from None
        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
