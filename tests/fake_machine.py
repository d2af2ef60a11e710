"""Machines that are not here: `FakeMachine` answers from dictionaries; some boards and PCs.

File contents follow what Jetson Linux, the NVIDIA driver and the kernel print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from var_deploy.host.machine import NO_DRIVER, Answer, Driver, Gpu, Machine

ORIN_NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"
DPKG = ("dpkg-query", "-W", "-f=${Version}")
TEGRA = """\
# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
"""
NVRM = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)\n"
    "GCC version:  gcc version 12.3.0\n"
)
ORIN_GPU = Gpu(
    name="Orin",
    memory=7_990_000_000,
    sm=87,
    multiprocessors=8,
    clock=1.02e9,
    memory_clock=1.02e9,
    bus_bits=128,
    integrated=True,
)
H100_GPU = Gpu(
    name="NVIDIA H100 80GB HBM3",
    memory=84_929_347_584,
    sm=90,
    multiprocessors=132,
    clock=1.83e9,
    memory_clock=2.619e9,
    bus_bits=5120,
)


@dataclass
class FakeMachine(Machine):
    """Attributes: files by path; programs by their whole command; packages by name; modules by
    name, with what importing them answers."""

    files: Mapping[str, str] = field(default_factory=dict)
    programs: Mapping[tuple[str, ...], Answer] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Answer] = field(default_factory=dict)
    cuda: Driver = field(default_factory=lambda: Driver(problem=NO_DRIVER))
    version: tuple[int, int, int] = (3, 10, 12)
    int8_answer: Answer = field(default_factory=Answer)
    processors: int = 6
    kind: str = "Linux aarch64"

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def run(self, *command: str) -> Answer:
        return self.programs.get(command, Answer(problem=f"{command[0]} is not installed"))

    def distribution(self, name: str) -> str | None:
        return self.packages.get(name)

    def has_module(self, name: str) -> bool:
        return any(module.partition(".")[0] == name for module in self.modules)

    def import_module(self, module: str, versioned: str = "") -> Answer:
        return self.modules.get(module, Answer(problem=f"No module named '{module}'"))

    def driver(self) -> Driver:
        return self.cuda

    def int8(self) -> Answer:
        return self.int8_answer

    def python(self) -> tuple[int, int, int]:
        return self.version

    def platform(self) -> str:
        return self.kind

    def total_processors(self) -> int:
        return self.processors

    def affinity(self) -> frozenset[int]:
        return frozenset(range(self.processors))


def meminfo(total: int, available: int) -> str:
    """/proc/meminfo of a machine with these MiB."""
    return (
        f"MemTotal:       {total << 10} kB\nMemFree:         {available << 9} kB\n"
        f"MemAvailable:   {available << 10} kB\n"
    )


def jetson(
    model: str = f"{ORIN_NANO} Super",
    memory: int = 7620,
    free: int = 6200,
    mode: str = "MAXN_SUPER",
) -> FakeMachine:
    """A board with JetPack 6.2 on which everything is installed that TensorRT needs."""
    return FakeMachine(
        files={
            "/proc/device-tree/model": f"{model}\0",
            "/etc/nv_tegra_release": TEGRA,
            "/proc/meminfo": meminfo(memory, free),
        },
        programs={
            (*DPKG, "nvidia-jetpack"): Answer(output="6.2+b77"),
            (*DPKG, "python3-libnvinfer"): Answer(output="10.3.0.30-1+cuda12.5"),
            ("nvpmodel", "-q"): Answer(output=f"NV Power Mode: {mode}\n2\n"),
        },
        modules={
            "tensorrt": Answer(output="10.3.0\n\n"),
            "cuda.bindings.runtime": Answer(output="12.9.0\n\n"),
        },
        cuda=Driver(cuda="12.6", gpus=(ORIN_GPU,)),
    )


def workstation() -> FakeMachine:
    """A PC with a GPU and everything that export and ONNX Runtime need, but no TensorRT."""
    return FakeMachine(
        files={"/proc/driver/nvidia/version": NVRM, "/proc/meminfo": meminfo(128_000, 120_000)},
        packages={"torch": "2.13.0", "onnx": "1.20.0", "safetensors": "0.6.2"},
        modules={
            "onnxruntime": Answer(output="1.23.2\nCUDAExecutionProvider CPUExecutionProvider\n")
        },
        cuda=Driver(cuda="12.8", gpus=(H100_GPU,)),
        version=(3, 12, 3),
        processors=32,
        kind="Linux x86_64",
    )
