"""Which precision suits what runs the graphs: int8 is for ONNX Runtime on CPUs.

Its operators are chosen for the kernels that ONNX Runtime has there; a GPU has fp16.
"""

from __future__ import annotations

from collections.abc import Collection

from var_deploy.config import CPU
from var_deploy.errors import BackendError, UsageError

# What is taken first where the choice is open. On a CPU int8 is the fastest, and a bundle has it
# only where its export was asked for it; fp16 graphs are computed in fp32 there, with casts.
ON_CPU, ON_GPU = ("int8", "fp32", "fp16"), ("fp16", "fp32")


def check_gpu_precision(precision: str, runner: str) -> None:
    """Raises UsageError for int8; `runner` is what would run it on a GPU."""
    if precision == "int8":
        raise UsageError(f"precision int8 is for {CPU}, not for {runner}; take fp16 or fp32")


def refuse_int8(problem: str) -> None:
    """Raise BackendError where `problem` says what is wrong with int8 on this CPU."""
    if problem:
        raise BackendError(
            f"{problem}; take another --precision, or another version of onnxruntime"
        )


def gpu_precision(held: Collection[str], runner: str) -> str:
    """The precision that `runner` takes of those that a bundle holds.

    Raises BackendError where none is for a GPU.
    """
    for precision in ON_GPU:
        if precision in held:
            return precision
    raise BackendError(
        f"the bundle has {', '.join(held)} graphs alone, which are for {CPU}, not for {runner}; "
        "export it again with --precision fp16"
    )


def cpu_precision(held: Collection[str], *, int8: bool = True) -> str:
    """The precision that ONNX Runtime on a CPU takes of those that a bundle holds.

    `int8` is whether the processor computes it correctly; without it int8 comes last.
    """
    order = ON_CPU if int8 else (*(p for p in ON_CPU if p != "int8"), "int8")
    return next((p for p in order if p in held), next(iter(held)))
