"""How many threads a process should have, by its mask, its control groups and its cores."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from fake_machine import FakeMachine, meminfo
from var_deploy.errors import UsageError
from var_deploy.host.machine import Machine, check_threads, cpu_quota, memory_of, usable_cores

V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 24 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 24 0:28 / /sys/fs/cgroup/cpuset rw shared:11 - cgroup cgroup rw,cpuset\n"
    "broken line\n"
)
CPU = "/sys/fs/cgroup/cpu,cpuacct"


def machine(files: dict[str, str], mounts: str, group: str, count: int = 8) -> FakeMachine:
    where = {"/proc/self/mountinfo": mounts, "/proc/self/cgroup": group}
    return FakeMachine(files={**where, **files}, processors=count)


def v1(quota: int, period: int = 100_000, folder: str = CPU) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}"}


@pytest.mark.parametrize(
    ("files", "mounts", "group", "quota", "cores"),
    [
        ({}, "", "", None, 8),
        ({}, V2, "0::/\n", None, 8),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, V2, "0::/\n", None, 8),
        # a container with a namespace of its own
        ({"/sys/fs/cgroup/cpu.max": "200000 100000\n"}, V2, "0::/\n", 2.0, 2),
        ({"/sys/fs/cgroup/cpu.max": "250000 100000\n"}, V2, "0::/\n", 2.5, 2),
        ({"/sys/fs/cgroup/cpu.max": "30000 100000\n"}, V2, "0::/\n", 0.3, 1),
        ({"/sys/fs/cgroup/cpu.max": "9000000 100000\n"}, V2, "0::/\n", 90.0, 8),
        # a service, and the slice above it
        ({"/sys/fs/cgroup/a/b/cpu.max": "300000 100000"}, V2, "0::/a/b\n", 3.0, 3),
        (
            {"/sys/fs/cgroup/a/b/cpu.max": "max 100000", "/sys/fs/cgroup/a/cpu.max": "50000 10000"},
            *(V2, "0::/a/b\n", 5.0, 5),
        ),
        # the host's path, which a container does not see
        ({"/sys/fs/cgroup/cpu.max": "400000 100000\n"}, V2, "0::/../../docker/ab\n", 4.0, 4),
        # version 1, as the host and as a container see it
        (v1(-1), V1, "4:cpu,cpuacct:/\n3:cpuset:/\n", None, 8),
        (v1(300_000), V1, "4:cpu,cpuacct:/\n3:cpuset:/\n0::/\n", 3.0, 3),
        (v1(150_000), V1, "4:cpuacct,cpu:/docker/ab\n", 1.5, 1),
        (v1(600_000, folder=f"{CPU}/x"), V1.replace("0:27 /", "0:27 /up"), "4:cpu:/up/x\n", 6.0, 6),
        ({f"{CPU}/cpu.cfs_quota_us": "100000"}, V1, "4:cpu,cpuacct:/\n", None, 8),
        ({f"{CPU}/cpu.cfs_quota_us": "nonsense"}, V1, "4:cpu,cpuacct:/\n::\n\n", None, 8),
        (v1(100_000, period=0), V1, "4:cpu,cpuacct:/\n", None, 8),
    ],
)
def test_the_quota_of_control_groups(
    files: dict[str, str], mounts: str, group: str, quota: float | None, cores: int
) -> None:
    here = machine(files, mounts, group)
    assert cpu_quota(here) == quota
    assert usable_cores(here) == here.threads() == cores


def siblings(name: str = "core_cpus_list") -> dict[str, str]:
    """Four cores with two logical processors each: 0 and 4, 1 and 5, …"""
    return {
        f"/sys/devices/system/cpu/cpu{n}/topology/{name}": f"{n % 4},{n % 4 + 4}\n"
        for n in range(8)
    }


@dataclass
class Masked(FakeMachine):
    mask: frozenset[int] | None = None

    def affinity(self) -> Any:
        return self.mask


def test_a_thread_for_each_physical_core_of_the_mask() -> None:
    assert usable_cores(FakeMachine(files=siblings(), processors=8)) == 4
    assert usable_cores(FakeMachine(files=siblings("thread_siblings_list"), processors=8)) == 4
    assert FakeMachine(files=siblings(), processors=8).threads() == 8
    for mask, cores in (({0, 4}, 1), ({0, 5}, 2), ({3}, 1), ({1, 2, 3, 5}, 3)):
        here = Masked(files=siblings(), processors=8, mask=frozenset(mask))
        assert (usable_cores(here), here.threads()) == (cores, len(mask))
    narrow = {**siblings(), "/proc/self/mountinfo": V2, "/proc/self/cgroup": "0::/"}
    narrow["/sys/fs/cgroup/cpu.max"] = "300000 100000"
    assert usable_cores(Masked(files=narrow, processors=8, mask=frozenset(range(8)))) == 3
    assert usable_cores(Masked(files=narrow, processors=8, mask=frozenset({2, 6}))) == 1


def test_where_the_system_tells_no_mask_the_library_decides() -> None:
    elsewhere = Masked(processors=6, mask=None)
    assert usable_cores(elsewhere) is None and elsewhere.threads() == 6


@pytest.mark.skipif(sys.platform != "linux", reason="masks are Linux's")
def test_this_process_under_a_mask() -> None:
    number = min(os.sched_getaffinity(0))
    script = "from var_deploy.host.machine import *; print(usable_cores(), Machine().threads())"
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{number}}}); {script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", "1"] and not done.stderr
    cores = usable_cores()
    assert cores is not None and 1 <= cores <= Machine().threads() <= Machine().total_processors()


def test_numbers_of_threads_are_bounded() -> None:
    here, large = FakeMachine(processors=2), FakeMachine(processors=96)
    assert check_threads(None) is None and check_threads(None, machine=here) is None
    for number, where in ((1, here), (64, here), (384, large), (4096, None)):
        assert check_threads(number, machine=where) == number
    for number, where, said in (
        (0, here, "threads must be at least 1, found 0"),
        (-7, None, "threads must be at least 1, found -7"),
        (65, here, r"at most 64 on this machine \(2 processors\), found 65"),
        (385, large, r"at most 384 on this machine \(96 processors\), found 385"),
        (100_000, None, "at most 4096, found 100000"),
        (10**5000, here, "found a number of more than 18 digits"),
        (True, here, "threads must be a whole number, found True"),
        (2.0, here, "threads must be a whole number, found 2.0"),
        ("2", None, "threads must be a whole number, found '2'"),
    ):
        with pytest.raises(UsageError, match=said):
            check_threads(number, machine=where)  # type: ignore[arg-type]


MIB = 1 << 20
MEMORY_V1 = "33 24 0:29 / /sys/fs/cgroup/memory rw shared:12 - cgroup cgroup rw,memory\n"


def limited(folder: str, limit: str, used: int, cached: int) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used * MIB}\n",
        f"{folder}/memory.stat": f"anon 5\nfile {cached * MIB}\nfile_mapped 7\n",
    }


@pytest.mark.parametrize(
    ("files", "mounts", "group", "total", "free"),
    [
        ({}, V2, "0::/\n", 8000, 6000),
        (limited("/sys/fs/cgroup", "max", 900, 0), V2, "0::/\n", 8000, 6000),
        # cached files leave where room is needed
        (limited("/sys/fs/cgroup", str(1000 * MIB), 900, 600), V2, "0::/\n", 1000, 700),
        (limited("/sys/fs/cgroup", str(7000 * MIB), 100, 0), V2, "0::/\n", 7000, 6000),
        (limited("/sys/fs/cgroup/a", str(1000 * MIB), 1300, 0), V2, "0::/a/b\n", 1000, 0),
        (
            {
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2000 * MIB}",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{500 * MIB}",
                "/sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_cache {100 * MIB}\n",
            },
            *(MEMORY_V1, "5:memory:/docker/ab\n", 2000, 1600),
        ),
    ],
)
def test_memory_is_that_of_the_control_groups(
    files: dict[str, str], mounts: str, group: str, total: int, free: int
) -> None:
    found = {**files, "/proc/meminfo": meminfo(8000, 6000)}
    assert memory_of(machine(found, mounts, group)) == (total * MIB, free * MIB)
