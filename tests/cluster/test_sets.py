"""Sets on a cluster are those of one process, whatever is lost on the way."""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cli_steps import done, refused, run, tree
from var_deploy.cli.console import ProgressBar

pytest.importorskip("ray", reason="the extra ray is not installed")

Files = Mapping[str, bytes | None]


@pytest.fixture
def sample(pocket_bundle: Path, settings: tuple[Any, ...], nodes: Any, tmp_path: Path) -> list[Any]:
    """The command for the set on the cluster, into tmp_path / "set"."""
    out = ("--out", tmp_path / "set", "--ray", nodes.address)
    return ["sample", pocket_bundle, *settings, *out]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have things happen once so many images are there; all of them must have happened."""

    def plan(*steps: tuple[int, Callable[[], object]]) -> None:
        left = list(steps)

        def update(self: ProgressBar, message: str, fraction: float) -> None:
            found = re.match(r"image (\d+) of \d+", message)
            while found and left and int(found[1]) >= left[0][0]:
                left.pop(0)[1]()

        monkeypatch.setattr(ProgressBar, "update", update)

    return plan


def test_the_same_set(sample: list[Any], alone: Files, tmp_path: Path) -> None:
    report = json.loads(done(*sample, "--json").stdout)
    assert tree(tmp_path / "set") == alone
    assert report["made"] == list(range(20))
    assert (report["ray"]["workers"], report["ray"]["lost"]) == (2, 0)
    assert report["runtime"]["threads"] == 1


def test_results_may_be_seen_in_any_order(
    sample: list[Any], alone: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls of one worker can both be done when Ray is asked, and the later be named first."""
    import ray

    real, turned = ray.wait, []

    def newest_first(calls: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        done, _ = real(calls, num_returns=len(calls), timeout=2)
        turned.append(len(done) > 1)
        return done[-1:], [call for call in calls if call not in done[-1:]]

    monkeypatch.setattr(ray, "wait", newest_first)
    done(*sample, "--workers", 1)
    assert any(turned)
    assert tree(tmp_path / "set") == alone


def test_a_worker_and_all_nodes_are_lost_and_one_joins(
    sample: list[Any],
    alone: Files,
    nodes: Any,
    kill: Callable[[list[int]], None],
    at: Callable[..., None],
    tmp_path: Path,
) -> None:
    def both() -> list[int]:
        found: list[int] = []
        while len(found) < 2:
            found = nodes.workers()
        return found

    at(
        (8, lambda: kill(both()[:1])),
        (16, nodes.remove),
        (24, nodes.remove),
        (24, nodes.add),
        (40, lambda: None),
    )
    report = json.loads(done(*sample, "--json").stdout)
    assert tree(tmp_path / "set") == alone
    assert report["ray"]["lost"] >= 2  # a worker that was not yet started is moved by Ray
    assert report["made"] == list(range(20))


@pytest.mark.parametrize(
    ("title", "losses", "words"),
    [
        ("ray::Worker.draw", 3, "over shard 0 ("),
        ("ray::Worker.load", 1, "while they loaded the bundle ("),
    ],
)
def test_whoever_takes_a_shard_is_lost(
    sample: list[Any],
    nodes: Any,
    kill: Callable[[list[int]], None],
    monkeypatch: pytest.MonkeyPatch,
    title: str,
    losses: int,
    words: str,
) -> None:
    over = threading.Event()

    def hunt() -> None:
        while not over.wait(0.01):
            kill(nodes.workers(title))

    monkeypatch.setattr("var_deploy.cluster.sets.LOSSES", losses)
    hunter = threading.Thread(target=hunt)
    hunter.start()
    # one shard, which takes long enough to be seen
    one = ("--per-class", 20, "--shard-size", 200, "--workers", 1)
    try:
        line = refused(1, *sample, *one, parts=(f"{losses} workers ended {words}",))
    finally:
        over.set()
        hunter.join()
    assert line.endswith("whole shards are kept: the same command makes the rest\n")
    assert not nodes.workers()


def test_a_full_disk(
    sample: list[Any], alone: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, written = Path.replace, []

    def full(self: Path, target: Path) -> Path:
        if target.suffix == ".tar":
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(target.name)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        refused(1, *sample, parts=("No space left on device; whole shards are kept",))
    there = {path.name for path in (tmp_path / "set").glob("*.tar")}
    listed = json.loads((tmp_path / "set" / "set.json").read_text())["shards"]
    assert there == set(written) == {entry["file"] for entry in listed} and len(there) == 3
    report = json.loads(done(*sample, "--json").stdout)
    assert len(report["made"]) == 17
    assert tree(tmp_path / "set") == alone


def test_what_a_worker_refuses(sample: list[Any], tmp_path: Path) -> None:
    line = refused(1, *sample, "--precision", "fp16", parts=("the bundle has no fp16 graphs",))
    assert "ray::" not in line
    refused(2, *sample, "--threads", 64, parts=("no node of the cluster has 64 CPUs and ",))
    assert not (tmp_path / "set").exists()


def test_interrupted(
    sample: list[Any], nodes: Any, at: Callable[..., None], tmp_path: Path
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    at((10, interrupt))
    result = run(*sample)
    kept = f"{tmp_path / 'set'} keeps 5 of 20 shards; the same command goes on from there\n"
    assert (result.exit_code, result.stderr) == (130, f"{kept}interrupted\n")
    listed = json.loads((tmp_path / "set" / "set.json").read_text())["shards"]
    assert len(listed) == 5
    assert {entry["file"] for entry in listed} == {p.name for p in (tmp_path / "set").glob("*.tar")}
    assert not nodes.workers()
