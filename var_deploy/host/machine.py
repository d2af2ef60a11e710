"""Facts about the machine that this process runs on: files, programs, processors, GPUs.

`doctor` and `plan --device this` use a `Machine`, which tests replace by a fake board. Its methods
do not raise: a missing file is None, a program that fails or hangs is an `Answer` with a problem.
Native code that could hang or crash runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from var_deploy.errors import UsageError
from var_deploy.host.installation import code_command, module_command

SECONDS = 20.0  # time limit; about the first import of a large library from a slow disk
MODEL, TEGRA_RELEASE = "/proc/device-tree/model", "/etc/nv_tegra_release"
NO_DRIVER = "no CUDA driver is installed"
MOST_THREADS_ELSEWHERE = 4096  # more than any machine has processors

# imports argv[1], prints the version of argv[2], then ONNX Runtime's execution providers
IMPORT = """
import importlib, sys
importlib.import_module(sys.argv[1])
module = importlib.import_module(sys.argv[2])
print(getattr(module, "__version__", "unknown"))
print(*getattr(module, "get_available_providers", tuple)())
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The output of a program, or its problem in one line."""

    output: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as the CUDA driver describes it; 0 where a value is unknown."""

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
    """The CUDA driver: the newest CUDA version that it supports ("12.6"), its GPUs, a problem."""

    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


class Machine:
    """Access to facts about this machine."""

    def read(self, path: str) -> str | None:
        """Text of a file; None where it is missing or cannot be read."""
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def run(self, *command: str) -> Answer:
        """Run a program to its end, or to the time limit."""
        import subprocess

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
        import importlib.metadata

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
        """Number of logical processors of the machine."""
        return os.cpu_count() or 1

    def affinity(self) -> frozenset[int] | None:
        """Numbers of the logical processors that may run this process; None where unknown."""
        return frozenset(os.sched_getaffinity(0)) if sys.platform == "linux" else None

    def threads(self) -> int:
        """Number of logical processors that this process may use, by its affinity mask and the
        quota of its control groups."""
        allowed = self.affinity()
        count = self.total_processors() if allowed is None else len(allowed)
        return _within_quota(count, cpu_quota(self))

    def running_threads(self) -> int:
        """Number of threads of this process that run or wait for a processor; 0 where unknown."""
        count = 0
        try:
            tasks = os.listdir("/proc/self/task")
        except OSError:
            return 0
        for task in tasks:
            text = self.read(f"/proc/self/task/{task}/stat") or ""
            count += text.rpartition(")")[2].split()[:1] == ["R"]  # the name may hold spaces
        return count

    def import_module(self, module: str, versioned: str = "") -> Answer:
        """Import a module in a new interpreter: its version, then ONNX Runtime's providers."""
        return self.run(*code_command(IMPORT, module, versioned or module))

    def driver(self) -> Driver:
        """The CUDA driver and its GPUs, from a child process; where it fails, from nvidia-smi."""
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
        """The error of int8 with ONNX Runtime, "" where it is correct; from a child process."""
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
    """Name of the Jetson board, None where this is another machine."""
    model = (machine.read(MODEL) or "").strip("\0 \n")
    if "Jetson" in model or "Orin" in model:
        return model
    return "unknown Jetson" if machine.read(TEGRA_RELEASE) else None


def processor_name(machine: Machine) -> str:
    """Name of the processor from the kernel; the platform on Arm, where the kernel has no name."""
    text = machine.read("/proc/cpuinfo") or ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return name[1].strip() if name else machine.platform()


def memory_of(machine: Machine) -> tuple[int, int] | None:
    """(total, available) bytes of memory as Linux sees them, within the limits of this process's
    control groups, as a container has them; None on other systems."""
    text = machine.read("/proc/meminfo") or ""
    found = {
        key: int(kilobytes) << 10
        for key, kilobytes in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.M)
    }
    if "MemTotal" not in found:
        return None
    total, available = found["MemTotal"], found.get("MemAvailable", found["MemTotal"])
    for folder, unified in _control_groups(machine, "memory"):
        limit, room = _memory_limit(machine, folder, unified)
        total, available = int(min(total, limit)), int(min(available, room))
    return total, available


# how many threads


def usable_cores(machine: Machine | None = None) -> int | None:
    """Number of threads for a computation in this process: one per physical core that it may use,
    and at most the CPU quota of its control groups.

    None where that is unknown (on systems other than Linux); the library then decides.
    """
    machine = machine or Machine()
    allowed = machine.affinity()
    if allowed is None:
        return None
    return _within_quota(len({_core_of(machine, n) for n in allowed}), cpu_quota(machine))


def running_elsewhere(machine: Machine) -> int:
    """Number of threads of other programs that run or wait for a processor right now.

    From /proc/loadavg (proc(5)), which counts those of the whole machine, or of the container where
    the system shows each its own. 0 where that is unknown, as on systems other than Linux.
    """
    numbers = re.search(r" (\d+)/\d+ ", machine.read("/proc/loadavg") or "")
    return max(int(numbers[1]) - machine.running_threads(), 0) if numbers else 0


def is_crowded(machine: Machine, threads: int, elsewhere: int) -> bool:
    """Whether `threads` of this process and those that run `elsewhere` are more than the machine
    has processors, so that some of them wait."""
    return elsewhere > 0 and elsewhere + threads > machine.total_processors()


def check_threads(threads: int | None, *, machine: Machine | None = None) -> int | None:
    """Validate a number of threads for `machine`; None stays None.

    More threads than processors only wait for each other, and thousands of them hang. So the limit
    is four threads per processor of the machine, at least 64; without `machine`, which stands for
    another machine, 4096.

    Raises UsageError where `threads` is not a whole number from 1 to the limit.
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
    """The limit of `check_threads` for a machine."""
    return max(64, 4 * machine.total_processors())


def _shorten(number: int) -> str:
    """A number for an error message; a long one as its number of digits."""
    return str(number) if number < 10**18 else "a number of more than 18 digits"


def cpu_quota(machine: Machine) -> float | None:
    """CPU quota of this process's control groups, in processors; None without a limit.

    The smallest quota of a group and of the groups above it counts.
    """
    groups = _control_groups(machine, "cpu")
    limits = [_limit(machine, folder, unified) for folder, unified in groups]
    return min((limit for limit in limits if limit is not None), default=None)


def _control_groups(machine: Machine, controller: str) -> Iterator[tuple[str, bool]]:
    """(folder, whether it is of version 2) of this process's control groups of a controller, and of
    the groups above them."""
    mounts = list(_control_mounts(machine.read("/proc/self/mountinfo") or ""))
    for line in (machine.read("/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        unified = number == "0" and not controllers
        if not unified and controller not in controllers.split(","):
            continue
        for kind, controlled, root, point in mounts:
            if kind != ("cgroup2" if unified else "cgroup"):
                continue
            if not unified and controller not in controlled:
                continue
            for folder in _groups_above(group, root, point):
                yield folder, unified


def _within_quota(count: int, quota: float | None) -> int:
    """Limit a number of threads to the whole processors of a quota; more would wait."""
    return count if quota is None else max(min(count, int(quota)), 1)


def _core_of(machine: Machine, processor: int) -> str:
    """A text that is equal for all logical processors of one physical core."""
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
    """Folders of a control group and of the groups above it, as far as they are mounted.

    A container may see its group's path as on the host: then its group is the mount point.
    """
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


def _memory_limit(machine: Machine, folder: str, unified: bool) -> tuple[float, float]:
    """(limit, room) in bytes of a control group; infinite without a limit.

    Cached file contents, mapped ones too, leave the group's memory where others need room.
    """
    names = ("memory.max", "memory.current", "file") if unified else (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache",
    )
    limit, used = ((machine.read(f"{folder}/{name}") or "").strip() for name in names[:2])
    if not limit.isdecimal() or not used.isdecimal():
        return math.inf, math.inf  # "max", or no such file
    stat = machine.read(f"{folder}/memory.stat") or ""
    cached = re.search(rf"^{names[2]} (\d+)$", stat, re.M)
    held = int(used) - (int(cached[1]) if cached else 0)
    return int(limit), max(int(limit) - max(held, 0), 0)
