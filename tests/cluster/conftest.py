"""A Ray cluster of two nodes on this machine, and the set that its work is compared with."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cli_steps import done, tree

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
# twenty shards of two images
SETTINGS = ("--per-class", 4, "--shard-size", 2, "--seed", 3, "--threads", 1)


class Nodes:
    """A head that draws nothing, and two nodes with room for a worker each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {**NODE, "num_cpus": 0, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self.cluster.address
        self.others: list[Any] = []
        self.fill()

    def fill(self) -> None:
        while len(self.others) < 2:
            self.add()

    def add(self) -> None:
        self.others.append(self.cluster.add_node(**NODE))

    def remove(self) -> None:
        """The older one, without a word."""
        self.cluster.remove_node(self.others.pop(0), allow_graceful=False)

    def workers(self, title: str = "ray::Worker") -> list[int]:
        """Processes of the nodes, the older one's first, whose title begins so."""
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.others]
        found = processes()
        return [
            pid
            for raylet in raylets
            for pid, (parent, words) in found.items()
            if parent == raylet and words.startswith(title)
        ]

    def stop(self) -> None:
        self.cluster.shutdown()


def processes() -> Mapping[int, tuple[int, str]]:
    """pid → parent and command line of this process and all that it started; what else runs on the
    machine is nobody's business."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.name))
    found, left = {}, [(os.getppid(), os.getpid())]
    while left:
        parent, pid = left.pop()
        found[pid] = parent, command_line(pid)
        left += [(pid, child) for child in children.get(pid, [])]
    return found


def command_line(pid: int) -> str:
    """Of one process, whatever bytes it was given; "" where it has ended."""
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return data.decode("utf-8", "backslashreplace").replace("\0", " ")


def end(pids: list[int]) -> None:
    """With SIGKILL."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def started() -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    nodes = Nodes()
    yield nodes
    nodes.stop()


@pytest.fixture
def nodes(started: Nodes) -> Nodes:
    """Two of them, whatever an earlier test has removed."""
    started.fill()
    return started


@pytest.fixture(scope="session")
def kill() -> Callable[[list[int]], None]:
    return end


@pytest.fixture(scope="session", name="processes")
def processes_fixture() -> Callable[[], Mapping[int, tuple[int, str]]]:
    return processes


@pytest.fixture(scope="session")
def marked() -> Callable[[str], list[int]]:
    """Processes whose environment holds a text, orphans among them."""

    def find(text: str) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if text.encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found

    return find


@pytest.fixture
def bundle(pocket_bundle: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(pocket_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def alone(
    pocket_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, bytes | None]:
    """The files of the set as one process makes it."""
    out = tmp_path_factory.mktemp("alone") / "set"
    done("sample", pocket_bundle, *SETTINGS, "--out", out)
    return tree(out)


@pytest.fixture(scope="session")
def settings() -> tuple[Any, ...]:
    """Options of `sample` for that set."""
    return SETTINGS
