"""Devices known to `plan`: memory, bandwidth and compute rates, as published.

Sources, also named in each entry:
- NVIDIA data sheets of the Jetson Orin Nano, Orin NX (DS-10712), AGX Orin and Thor modules; the
  Super modes are those of JetPack 6.2.
- NVIDIA data sheets of A100, H100, H200 and L4, and the architecture papers of GA102, Ada and
  RTX Blackwell for GeForce cards.

For Jetson boards NVIDIA publishes sparse INT8 (Orin) or sparse FP4 (Thor) rates. The dense fp16
rates here are derived from the tensor cores: 512 operations a clock and core on Orin, which times
four is the published sparse INT8 rate of the GPU (40 TOPS for the Orin Nano 8GB, 170 for the AGX
Orin 64GB); on Thor an eighth of the 2070 sparse FP4 TFLOPS.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from var_deploy.errors import UsageError
from var_deploy.host.machine import Gpu, Machine, jetson_model, memory_of

GIB = 1 << 30
# Linux sees 7620 MiB of an 8 GiB module; firmware and carve-outs take the rest
VISIBLE = 0.93
JETSON_SYSTEM = 1_500_000_000  # Ubuntu without a desktop; a desktop takes about a gigabyte more
GPU_SYSTEM = 500_000_000  # a display and the driver
ORIN_CLOCK_OPERATIONS = 512  # dense fp16 operations per tensor core and clock

# by SM: dense fp16 operations per clock and multiprocessor (with fp16 sums where those are faster),
# and CUDA cores per multiprocessor; derived from the published rates
TENSOR_OPERATIONS = {80: 2048, 87: 2048, 90: 4096, 100: 8192, 101: 8192, 103: 8192, 110: 8192}
OTHER_TENSOR_OPERATIONS = 1024
CORES = {75: 64, 80: 64}
OTHER_CORES = 128
JETSON_FAMILIES = (
    ("Orin Nano", "orin-nano"),
    ("Orin NX", "orin-nx"),
    ("AGX Orin", "agx-orin"),
    ("Thor", "thor"),
)

# assumptions about a processor that does not tell
CPU_CLOCK = 3e9  # of a busy core; a virtual machine reports the base clock
CPU_BANDWIDTH = 51.2e9  # two channels of DDR4-3200
# fp32 operations per core and clock
VECTOR_OPERATIONS = (("avx512f", 64), ("avx2", 32), ("asimd", 16))
# int8 operations per core and clock: two vector units that sum four products at once; older
# instruction sets need three instructions for that
INT8_OPERATIONS = (
    ("avx512_vnni", 256),
    ("avx_vnni", 128),
    ("i8mm", 128),
    ("avx512bw", 85),
    ("asimddp", 64),
    ("avx2", 42),
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device: memory, bandwidth and compute rates, the inputs of a prediction.

    Attributes:
        name: the name for --device; title: the name in texts.
        memory: bytes that programs can see.
        reserved: part of `memory` that the system uses.
        bandwidth: bytes per second.
        compute_rate: dense operations per second, of fp16 on a GPU, of int8 on a CPU.
        full_rate: fp32 operations per second, without TF32, which engines here do not use.
        sm: 87 for compute capability 8.7; None without a GPU.
        one_memory: CPU and GPU share their memory.
        source: source of the numbers.
        derived: numbers that are not published but derived, and how; "" where there are none.
    """

    name: str
    title: str
    memory: int
    reserved: int
    bandwidth: float
    compute_rate: float
    full_rate: float
    sm: int | None
    one_memory: bool
    source: str
    derived: str = ""

    @property
    def available(self) -> int:
        """Bytes of memory that var-deploy can use."""
        return max(self.memory - self.reserved, 0)

    def rate(self, precision: str) -> float:
        """Operations per second in graphs of this precision; a CPU computes fp16 in fp32."""
        fast = "int8" if self.sm is None else "fp16"
        return self.compute_rate if precision == fast else self.full_rate


_NANO = "NVIDIA Jetson Orin Nano Series data sheet"
_NX = "NVIDIA Jetson Orin NX Series data sheet DS-10712"
_AGX = "NVIDIA Jetson AGX Orin Series technical brief"
_SUPER = "NVIDIA JetPack 6.2, Super Mode"
# name, title, GiB, GB/s, CUDA cores, MHz, source
_ORIN = (
    ("orin-nano-4gb", "Orin Nano 4GB", 4, 34.0, 512, 625, _NANO),
    ("orin-nano-8gb", "Orin Nano 8GB", 8, 68.0, 1024, 625, _NANO),
    ("orin-nano-4gb-super", "Orin Nano 4GB, Super", 4, 51.0, 512, 1020, _SUPER),
    ("orin-nano-8gb-super", "Orin Nano 8GB, Super", 8, 102.0, 1024, 1020, _SUPER),
    ("orin-nx-8gb", "Orin NX 8GB", 8, 102.4, 1024, 765, _NX),
    ("orin-nx-16gb", "Orin NX 16GB", 16, 102.4, 1024, 918, _NX),
    ("orin-nx-8gb-super", "Orin NX 8GB, Super", 8, 102.4, 1024, 1173, _SUPER),
    ("orin-nx-16gb-super", "Orin NX 16GB, Super", 16, 102.4, 1024, 1173, _SUPER),
    ("agx-orin-32gb", "AGX Orin 32GB", 32, 204.8, 1792, 930, _AGX),
    ("agx-orin-64gb", "AGX Orin 64GB", 64, 204.8, 2048, 1300, _AGX),
)

# cards with memory of their own; "halved": the data sheet gives the sparse rate alone
_HALVED = "data sheet, its sparse rate halved"
_PAPER = "architecture paper, fp16 with fp16 sums"
# name, title, GB, GB/s, TFLOPS in dense fp16 and in fp32, SM, source
_CARDS = (
    ("a100-40gb", "A100 SXM 40GB", 40, 1555, 312.0, 19.5, 80, "NVIDIA A100 data sheet"),
    ("a100-80gb", "A100 SXM 80GB", 80, 2039, 312.0, 19.5, 80, "NVIDIA A100 data sheet"),
    ("h100", "H100 SXM 80GB", 80, 3350, 989.5, 67.0, 90, f"NVIDIA H100 {_HALVED}"),
    ("h200", "H200 SXM 141GB", 141, 4800, 989.5, 67.0, 90, f"NVIDIA H200 {_HALVED}"),
    ("l4", "L4 24GB", 24, 300, 121.0, 30.3, 89, f"NVIDIA L4 {_HALVED}"),
    ("rtx-3090", "GeForce RTX 3090", 24, 936, 142.0, 35.6, 86, f"NVIDIA GA102 {_PAPER}"),
    ("rtx-4090", "GeForce RTX 4090", 24, 1008, 330.3, 82.6, 89, f"NVIDIA Ada {_PAPER}"),
    ("rtx-5090", "GeForce RTX 5090", 32, 1792, 419.0, 104.8, 120, f"NVIDIA Blackwell {_PAPER}"),
)


def _orin(
    name: str, title: str, gib: int, bandwidth: float, cores: int, mhz: int, source: str
) -> Device:
    """A module with the Orin GPU: 128 CUDA cores and 4 tensor cores per multiprocessor."""
    tensor_cores = cores // 32
    rate = tensor_cores * ORIN_CLOCK_OPERATIONS * mhz * 1e6
    return Device(
        name=name,
        title=f"Jetson {title}",
        memory=int(gib * GIB * VISIBLE),
        reserved=JETSON_SYSTEM,
        bandwidth=bandwidth * 1e9,
        compute_rate=rate,
        full_rate=2 * cores * mhz * 1e6,
        sm=87,
        one_memory=True,
        source=source,
        derived=f"dense fp16 from {tensor_cores} tensor cores × {ORIN_CLOCK_OPERATIONS} operations "
        f"× {mhz} MHz, a quarter of {4 * rate / 1e12:.0f} sparse INT8 TOPS",
    )


def _card(
    name: str,
    title: str,
    gigabytes: int,
    bandwidth: float,
    tensor: float,
    full: float,
    sm: int,
    source: str,
) -> Device:
    return Device(
        name=name,
        title=title,
        memory=gigabytes * 10**9,
        reserved=GPU_SYSTEM,
        bandwidth=bandwidth * 1e9,
        compute_rate=tensor * 1e12,
        full_rate=full * 1e12,
        sm=sm,
        one_memory=False,
        source=source,
    )


_THOR = Device(
    name="thor",
    title="Jetson Thor (T5000)",
    memory=int(128 * GIB * VISIBLE),
    reserved=JETSON_SYSTEM,
    bandwidth=273e9,
    compute_rate=2070e12 / 8,
    full_rate=2 * 2560 * 1.575e9,
    sm=110,
    one_memory=True,
    source="NVIDIA Jetson Thor Series data sheet",
    derived="dense fp16 as an eighth of 2070 sparse FP4 TFLOPS, fp32 from 2560 cores × 1575 MHz",
)
_ALL = (*(_orin(*row) for row in _ORIN), _THOR, *(_card(*row) for row in _CARDS))
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}


def find_device(name: str, machine: Machine | None = None) -> Device:
    """Find a device by name; "this" is this machine, "cpu" is its processor.

    Raises UsageError for an unknown name, or where this machine cannot be read.
    """
    here = machine or Machine()
    if name == "this":
        return this_device(here)
    if name == "cpu":
        return cpu_device(here)
    if name in DEVICES:
        return DEVICES[name]
    known = ("this", "cpu", *DEVICES)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"unknown device {name!r}; {hint}known are {', '.join(known)}")


def this_device(machine: Machine) -> Device:
    """The Jetson board, else the first GPU, else the processor of this machine."""
    board = _this_board(machine)
    if board:
        return board
    driver = machine.driver()
    if driver.gpus and driver.gpus[0].multiprocessors:
        return _this_gpu(driver.gpus[0], machine)
    return cpu_device(machine)


def _this_board(machine: Machine) -> Device | None:
    """The Jetson module nearest to this board in memory, with the memory that Linux sees now."""
    model, memory = jetson_model(machine), memory_of(machine)
    family = next((f for words, f in JETSON_FAMILIES if model and words in model), None)
    if not model or not memory or not family:
        return None
    modules = [device for device in _ALL if device.name.startswith(family)]
    fast = model.endswith("Super")  # flashed with the configuration of Super Mode
    modules = [d for d in modules if d.name.endswith("-super") == fast] or modules
    nearest = min(modules, key=lambda d: abs(d.memory - memory[0]))
    total, free = memory
    return dataclasses.replace(
        nearest,
        name="this",
        title=f"{model} ({nearest.title})",
        memory=total,
        reserved=total - free,
    )


def _this_gpu(gpu: Gpu, machine: Machine) -> Device:
    """A GPU with rates from multiprocessors and clocks, and bandwidth from the bus."""
    memory = memory_of(machine) if gpu.integrated else None
    sm = gpu.sm
    tensor = TENSOR_OPERATIONS.get(sm, OTHER_TENSOR_OPERATIONS)
    derived = f"{gpu.multiprocessors} multiprocessors at {gpu.clock / 1e6:.0f} MHz"
    return Device(
        name="this",
        title=gpu.name,
        memory=memory[0] if memory else gpu.memory,
        reserved=memory[0] - memory[1] if memory else GPU_SYSTEM,
        bandwidth=2 * gpu.memory_clock * gpu.bus_bits / 8,
        compute_rate=gpu.multiprocessors * tensor * gpu.clock,
        full_rate=gpu.multiprocessors * 2 * CORES.get(sm, OTHER_CORES) * gpu.clock,
        sm=sm,
        one_memory=gpu.integrated,
        source="the CUDA driver",
        derived=f"rates: {derived}; bandwidth: {gpu.bus_bits} bits, twice a clock",
    )


def cpu_device(machine: Machine) -> Device:
    """The processor of this machine, with estimated rates of ONNX Runtime.

    Raises UsageError where the size of the memory cannot be read.
    """
    memory = memory_of(machine)
    if memory is None:
        raise UsageError(
            "the memory of this machine cannot be read (it has no /proc/meminfo); name a device, "
            "as in --device orin-nano-8gb"
        )
    text = machine.read("/proc/cpuinfo") or ""
    flags = set(re.findall(r"\w+", " ".join(re.findall(r"^(?:flags|Features).*$", text, re.M))))
    vector = next((count for flag, count in VECTOR_OPERATIONS if flag in flags), 8)
    rounded = next((count for flag, count in INT8_OPERATIONS if flag in flags), vector)
    clocks = [float(mhz) * 1e6 for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.M)]
    clock = max([CPU_CLOCK, *clocks])
    cores = _cores(text, machine.threads())
    title = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    total, free = memory
    return Device(
        name="cpu",
        title=title.group(1).strip() if title else machine.platform(),
        memory=total,
        reserved=total - free,
        bandwidth=CPU_BANDWIDTH,
        compute_rate=cores * rounded * clock,
        full_rate=cores * vector * clock,
        sm=None,
        one_memory=True,
        source="/proc/cpuinfo and /proc/meminfo",
        derived=f"rates: {cores} cores × {clock / 1e6:.0f} MHz × {vector} operations in fp32, "
        f"{rounded} in int8; bandwidth: assumed, two channels of DDR4-3200",
    )


def _cores(cpuinfo: str, threads: int) -> int:
    """Number of physical cores, at most `threads`."""
    packages = re.findall(r"^physical id\s*:\s*(\d+)", cpuinfo, re.M)
    numbers = re.findall(r"^core id\s*:\s*(\d+)", cpuinfo, re.M)
    different = len(set(zip(packages, numbers, strict=False)))
    return min(threads, different) or threads
