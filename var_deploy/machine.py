"""What can be asked of the machine that this runs on.

`doctor` and `plan --device this` ask through a `Machine`, so that a test can stand in for a board.
Nothing raises: a file that is not there is None, a program that fails or hangs is an `Answer` with
a problem. Whatever could hang or crash in native code runs in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_deploy.installation import code_command, module_command

SECONDS = 20.0  # the first import of a large library from a slow disk takes about as long
MODEL, TEGRA_RELEASE = "/proc/device-tree/model", "/etc/nv_tegra_release"
NO_DRIVER = "no CUDA driver is installed"

# imports argv[1] and prints the version of argv[2], then what ONNX Runtime can run on
IMPORT = """
import importlib, sys
importlib.import_module(sys.argv[1])
module = importlib.import_module(sys.argv[2])
print(getattr(module, "__version__", "unknown"))
print(*getattr(module, "get_available_providers", tuple)())
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program printed, or in one line why it did not."""

    output: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as the CUDA driver describes it; 0 where it does not tell."""

    name: str
    memory: int  # bytes
    sm: int  # 87 for compute capability 8.7
    multiprocessors: int = 0
    clock: float = 0.0  # Hz
    memory_clock: float = 0.0  # Hz
    bus_bits: int = 0
    integrated: bool = False


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The CUDA driver: the newest CUDA that it serves ("12.6"), its GPUs, or what is wrong."""

    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


class Machine:
    """This machine."""

    def read(self, path: str) -> str | None:
        """Text of a file; None where there is none, or none that can be read."""
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def run(self, *command: str) -> Answer:
        """Run a program to its end, or to the time limit."""
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
                check=False,
            )
        except FileNotFoundError:
            return Answer(problem=f"{command[0]} is not installed")
        except subprocess.TimeoutExpired:
            return Answer(problem=f"no answer within {SECONDS:.0f} seconds")
        except OSError as error:
            return Answer(problem=f"{command[0]}: {error.strerror or error}")
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            return Answer(problem=lines[-1].strip() if lines else f"exit code {done.returncode}")
        return Answer(output=done.stdout)

    def distribution(self, name: str) -> str | None:
        """Version of an installed Python package, without importing it."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def has_module(self, name: str) -> bool:
        """Whether a top-level module could be imported."""
        try:
            return importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            return False

    def python(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    def platform(self) -> str:
        """Operating system and processor: "Linux aarch64"."""
        return f"{platform.system()} {platform.machine()}"

    def threads(self) -> int:
        """Logical processors that this process may use."""
        if sys.platform == "linux":
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def import_module(self, module: str, versioned: str = "") -> Answer:
        """Import in a fresh interpreter: version, and on the second line what is available."""
        return self.run(*code_command(IMPORT, module, versioned or module))

    def driver(self) -> Driver:
        """The CUDA driver and its GPUs, asked in a process of its own; else nvidia-smi's word."""
        answer = self.run(*module_command("var_deploy.cuda_driver"))
        try:
            data: Mapping[str, Any] = json.loads(answer.output) if answer.output else {}
            gpus = tuple(Gpu(**gpu) for gpu in data.get("gpus", ()))
        except (ValueError, TypeError) as error:
            return Driver(problem=f"the CUDA driver's answer cannot be read: {error}")
        problem = answer.problem or data.get("problem", "")
        if problem and (listed := self._listed_gpus()):
            return Driver(gpus=listed, problem=problem)
        return Driver(cuda=data.get("cuda", ""), gpus=gpus, problem=problem)

    def _listed_gpus(self) -> tuple[Gpu, ...]:
        query = "--query-gpu=name,memory.total,compute_cap"
        answer = self.run("nvidia-smi", query, "--format=csv,noheader,nounits")
        found = []
        for line in answer.output.splitlines():
            name, *numbers = (part.strip() for part in line.split(","))
            if len(numbers) == 2 and re.fullmatch(r"\d+", numbers[0]):
                sm = re.sub(r"\D", "", numbers[1])
                found.append(Gpu(name=name, memory=int(numbers[0]) << 20, sm=int(sm or 0)))
        return tuple(found)


def jetson_model(machine: Machine) -> str | None:
    """Name of the board, None where this is no Jetson."""
    model = (machine.read(MODEL) or "").strip("\0 \n")
    if "Jetson" in model or "Orin" in model:
        return model
    return "unknown Jetson" if machine.read(TEGRA_RELEASE) else None


def memory_of(machine: Machine) -> tuple[int, int] | None:
    """Bytes of memory that Linux sees, and those of it that are available; None elsewhere."""
    text = machine.read("/proc/meminfo") or ""
    found = {
        key: int(kilobytes) << 10
        for key, kilobytes in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.M)
    }
    if "MemTotal" not in found:
        return None
    return found["MemTotal"], found.get("MemAvailable", found["MemTotal"])
