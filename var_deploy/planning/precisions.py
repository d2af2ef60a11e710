"""Chooses the precision for a backend: int8 for ONNX Runtime on CPUs, fp16 for GPUs.

The operators of int8 graphs are chosen for the CPU kernels of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Collection

from var_deploy.config import CPU
from var_deploy.errors import BackendError, UsageError

# Order of preference for "auto". On a CPU int8 is the fastest, and a bundle has it only where the
# user exported it; fp16 graphs are computed in fp32 there, with casts.
ON_CPU, ON_GPU = ("int8", "fp32", "fp16"), ("fp16", "fp32")


def check_gpu_precision(precision: str, runner: str) -> None:
    """Raise UsageError for int8; `runner` names the GPU library in the message."""
    if precision == "int8":
        raise UsageError(f"precision int8 is for {CPU}, not for {runner}; take fp16 or fp32")


def refuse_int8(problem: str) -> None:
    """Raise BackendError where `problem` (an error of int8 on this CPU) is not empty."""
    if problem:
        raise BackendError(
            f"{problem}; take another --precision, or another version of onnxruntime"
        )


def gpu_precision(held: Collection[str], runner: str) -> str:
    """The precision for `runner` on a GPU, of the precisions that a bundle holds.

    Raises BackendError where the bundle holds no precision for a GPU.
    """
    for precision in ON_GPU:
        if precision in held:
            return precision
    raise BackendError(
        f"the bundle has only {', '.join(held)} graphs, which are for {CPU}, not for {runner}; "
        "export it again with --precision fp16"
    )


def cpu_precision(held: Collection[str], *, int8: bool = True) -> str:
    """The precision for ONNX Runtime on a CPU, of the precisions that a bundle holds.

    `int8` says whether the processor computes int8 correctly; if not, int8 is the last choice.
    """
    order = ON_CPU if int8 else (*(p for p in ON_CPU if p != "int8"), "int8")
    return next((p for p in order if p in held), next(iter(held)))
