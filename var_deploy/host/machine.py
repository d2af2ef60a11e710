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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from var_deploy.errors import UsageError
from var_deploy.host.installation import code_command, module_command

SECONDS = 20.0  # the first import of a large library from a slow disk takes about as long
MODEL, TEGRA_RELEASE = "/proc/device-tree/model", "/etc/nv_tegra_release"
NO_DRIVER = "no CUDA driver is installed"
MOST_THREADS_ELSEWHERE = 4096  # more than one machine has processors for

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

    def total_processors(self) -> int:
        """Logical processors of the machine, whoever may use them."""
        return os.cpu_count() or 1

    def affinity(self) -> frozenset[int] | None:
        """Numbers of the logical processors that the system may run this process on; None where
        it does not tell."""
        return frozenset(os.sched_getaffinity(0)) if sys.platform == "linux" else None

    def threads(self) -> int:
        """Logical processors that this process may use, by its mask and by the quota of its
        control groups."""
        allowed = self.affinity()
        count = self.total_processors() if allowed is None else len(allowed)
        return _within_quota(count, cpu_quota(self))

    def import_module(self, module: str, versioned: str = "") -> Answer:
        """Import in a fresh interpreter: version, and on the second line what is available."""
        return self.run(*code_command(IMPORT, module, versioned or module))

    def driver(self) -> Driver:
        """The CUDA driver and its GPUs, asked in a process of its own; else nvidia-smi's word."""
        answer = self.run(*module_command("var_deploy.host.cuda_driver"))
        try:
            data: Mapping[str, Any] = json.loads(answer.output) if answer.output else {}
            gpus = tuple(Gpu(**gpu) for gpu in data.get("gpus", ()))
        except (ValueError, TypeError) as error:
            return Driver(problem=f"the CUDA driver's answer cannot be read: {error}")
        problem = answer.problem or data.get("problem", "")
        if problem and (listed := self._listed_gpus()):
            return Driver(gpus=listed, problem=problem)
        return Driver(cuda=data.get("cuda", ""), gpus=gpus, problem=problem)

    def int8(self) -> Answer:
        """What is wrong with int8 on ONNX Runtime here, "" where it is right; asked in a process
        of its own."""
        return self.run(*module_command("var_deploy.runtime.backends.int8_check"))

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


def processor_name(machine: Machine) -> str:
    """What the kernel calls the processor; on Arm, where it gives numbers alone, the platform."""
    text = machine.read("/proc/cpuinfo") or ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return name[1].strip() if name else machine.platform()


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


# how many threads


def usable_cores(machine: Machine | None = None) -> int | None:
    """Threads that a computation of this process should have: one for each physical core that it
    may run on, and no more than the quota of its control groups keeps busy.

    None where the system does not tell (only Linux does); a library then decides.
    """
    machine = machine or Machine()
    allowed = machine.affinity()
    if allowed is None:
        return None
    return _within_quota(len({_core_of(machine, n) for n in allowed}), cpu_quota(machine))


def check_threads(threads: int | None, *, machine: Machine | None = None) -> int | None:
    """`threads` as a number of threads for `machine`, or for another one where it is None.

    More threads than processors only wait for each other, and thousands of them do so for ever, so
    there is a bound: four for each processor of the machine and at least 64; for a machine that
    is not this one, 4096.

    Raises UsageError for what is no whole number from 1 to the bound; None stays None.
    """
    if threads is None:
        return None
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        raise UsageError(f"threads must be a whole number, found {threads!r}")
    number = threads.__index__()
    if number < 1:
        raise UsageError(f"threads must be at least 1, found {number}")
    most = MOST_THREADS_ELSEWHERE if machine is None else most_threads(machine)
    if number > most:
        here = ""
        if machine is not None:
            here = f" on this machine ({machine.total_processors()} processors)"
        raise UsageError(f"threads must be at most {most}{here}, found {_shorten(number)}")
    return number


def most_threads(machine: Machine) -> int:
    """The bound of `check_threads` for a machine."""
    return max(64, 4 * machine.total_processors())


def _shorten(number: int) -> str:
    """A number in words of an error: a long one by its number of digits."""
    return str(number) if number < 10**18 else "a number of more than 18 digits"


def cpu_quota(machine: Machine) -> float | None:
    """Processors that the control groups of this process let it keep busy on average; None where
    they set no limit. A group cannot have more than those above it."""
    mounts = list(_control_mounts(machine.read("/proc/self/mountinfo") or ""))
    limits = []
    for line in (machine.read("/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        unified = number == "0" and not controllers
        if not unified and "cpu" not in controllers.split(","):
            continue
        for kind, controlled, root, point in mounts:
            if kind != ("cgroup2" if unified else "cgroup"):
                continue
            if not unified and "cpu" not in controlled:
                continue
            for folder in _groups_above(group, root, point):
                limits.append(_limit(machine, folder, unified))
    return min((limit for limit in limits if limit is not None), default=None)


def _within_quota(count: int, quota: float | None) -> int:
    """A thread beyond the whole processors of a quota makes all of them wait for its end."""
    return count if quota is None else max(min(count, int(quota)), 1)


def _core_of(machine: Machine, processor: int) -> str:
    """The logical processors of a core, which are the same text for each of them."""
    folder = f"/sys/devices/system/cpu/cpu{processor}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second before Linux 5.3
        text = (machine.read(f"{folder}/{name}") or "").strip()
        if text:
            return text
    return str(processor)


def _control_mounts(mountinfo: str) -> Iterator[tuple[str, list[str], str, str]]:
    """(type, options, root, mount point) of every control-group file system (proc(5))."""
    for line in mountinfo.splitlines():
        mount, _, system = line.partition(" - ")
        places, kinds = mount.split(), system.split()
        if len(places) >= 5 and len(kinds) >= 3 and kinds[0] in ("cgroup", "cgroup2"):
            yield kinds[0], kinds[2].split(","), places[3], places[4]


def _groups_above(group: str, root: str, point: str) -> Iterator[str]:
    """Folders of a group and of those above it, as far as they are mounted. A container may see
    the path of its group as the host has it: then its own is where the mount begins."""
    path = PurePosixPath(group)
    inside = path.is_relative_to(root) and ".." not in path.parts
    parts = path.relative_to(root).parts if inside else ()
    for count in range(len(parts), -1, -1):
        yield str(PurePosixPath(point, *parts[:count]))


def _limit(machine: Machine, folder: str, unified: bool) -> float | None:
    if unified:
        numbers = (machine.read(f"{folder}/cpu.max") or "").split()
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        numbers = [(machine.read(f"{folder}/{name}") or "").strip() for name in names]
    if len(numbers) != 2 or not all(re.fullmatch(r"\d+", number) for number in numbers):
        return None  # "max", -1, or no such file
    quota, period = map(int, numbers)
    return quota / period if quota and period else None
