"""Addresses: where no Ray runs it is said at once, and what was started here ends here."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli_steps import ONE_THREAD, done, refused
from cli_steps import edit as edit_manifest

ray = pytest.importorskip("ray", reason="the extra ray is not installed")


@pytest.fixture
def closed() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that would start or join a cluster fails."""

    def init(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it goes to Ray")

    monkeypatch.setattr(ray, "init", init)


@pytest.fixture
def command(pocket_bundle: Path, tmp_path: Path) -> Iterator[list[Any]]:
    """A set that is refused: nothing is left."""
    yield ["sample", pocket_bundle, "--per-class", 1, "--out", tmp_path / "set"]
    assert not (tmp_path / "set").exists()


def test_workers_do_not_look_for_modules_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray adds the folder in which it was started to its workers' paths."""
    from var_deploy.cluster.connect import connected

    started_in: list[Path] = []
    monkeypatch.setattr(ray, "init", lambda *words, **options: started_in.append(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    with connected("local"):
        assert Path.cwd() == tmp_path
    assert started_in == [Path(sys.prefix)]


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_nobody_listens(command: list[Any], no_ray: None, closed: str, form: str) -> None:
    words = f"no Ray runs at {closed} (Connection refused); write local, auto, HOST:PORT"
    refused(2, *command, "--ray", form.format(closed), parts=(words,))


def test_an_address_from_the_environment(
    command: list[Any], no_ray: None, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed)
    refused(2, *command, "--ray", "auto", parts=(f"no Ray runs at {closed}",))


def test_something_else_listens(
    command: list[Any], no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("var_deploy.cluster.connect.PATIENCE", 0.5)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        address = f"127.0.0.1:{server.server_port}"
        refused(2, *command, "--ray", address, parts=(f"the server at {address} is not Ray",))


@pytest.mark.parametrize("address", ["", "here", "host:", "host:0", ":6379", "http://host:80"])
def test_no_address(command: list[Any], no_ray: None, address: str) -> None:
    refused(2, *command, "--ray", address, parts=("is not an address of a Ray cluster",))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("none"), "no Ray runs on this machine, and RAY_ADDRESS names none"),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0"),
            "differ: Version mismatch: The cluster was started with: Ray: 2.9.0; install the same",
        ),
    ],
)
def test_what_ray_refuses(
    command: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def init(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    refused(2, *command, "--ray", "auto", parts=(words,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ray", "local", "--shards", "1/2"), "leave --shards out"),
        (("--workers", 2), "say which with --ray"),
        (("--ray", "local", "--workers", 0), "0 is not in the range"),
        (("--ray", "local", "--shard-size", 0), "0 is not in the range"),
    ],
)
def test_bad_usage(command: list[Any], no_ray: None, options: tuple[Any, ...], words: str) -> None:
    refused(2, *command, *options, parts=(words,))


def test_what_needs_no_cluster(
    pocket_bundle: Path,
    alone: Mapping[str, bytes | None],
    tmp_path: Path,
    no_ray: None,
    settings: tuple[Any, ...],
    closed: str,
) -> None:
    out = tmp_path / "set"
    out.mkdir()
    for name, data in alone.items():
        (out / name).write_bytes(data or b"")
    command = ("sample", pocket_bundle, *settings, "--out", out, "--ray", closed)
    assert done(*command, "--check").stdout.startswith(f"{out} is complete")
    assert done(*command).stdout.startswith("made 0 shards")
    refused(2, *command, "--seed", 4, parts=("another set: seed is 3 and not 4",))


def test_a_set_of_another_bundle(
    bundle: Path,
    alone: Mapping[str, bytes | None],
    tmp_path: Path,
    no_ray: None,
    settings: tuple[Any, ...],
) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / "set.json").write_bytes(alone["set.json"] or b"")
    weights = "fp32/weights.bin"
    edit_manifest(bundle, lambda data: data["files"][weights].update(sha256="0" * 64))
    command = ("sample", bundle, *settings, "--out", out, "--ray", "local")
    refused(2, *command, parts=("another set: its bundle is ",))


def test_without_ray(command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("var_deploy.cluster.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(1, *command, "--ray", "local", parts=('pip install "ray[serve]>=',))


def test_interrupted_on_a_cluster_of_its_own(
    pocket_bundle: Path, tmp_path: Path, marked: Callable[[str], list[int]]
) -> None:
    """Ctrl-C keeps whole shards, says so in a word, and leaves no process."""
    out = tmp_path / "set"
    words = ("sample", pocket_bundle, "--per-class", 1000, "--shard-size", 1, "--out", out)
    process = subprocess.Popen(
        [sys.executable, "-m", "var_deploy.cli", *map(str, words), "--ray", "local"],
        env={**ONE_THREAD, "VAR_DEPLOY_TEST": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "000001.tar").exists() and process.poll() is None:
        time.sleep(0.1)
    assert len(marked(str(tmp_path))) > 3  # Ray and its workers
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, told = process.communicate(timeout=120)
    assert said == "" and told.endswith("the same command goes on from there\ninterrupted\n")
    assert process.returncode == 130
    for _ in range(100):
        if not marked(str(tmp_path)):
            break
        time.sleep(0.1)
    assert marked(str(tmp_path)) == []
    listed = [shard["file"] for shard in json.loads((out / "set.json").read_text())["shards"]]
    assert listed == sorted(path.name for path in out.glob("*.tar"))  # done in any order


def test_processes_of_strangers_are_left_alone(processes: Callable[[], Mapping[int, Any]]) -> None:
    """Names that are not UTF-8 disturb nobody, and only what the tests started is looked at."""
    name = b"\xff\xfe stranger"
    command = [sys.executable.encode(), b"-c", b"import sys; sys.stdin.read()", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as own:
        while own.pid not in processes() or "sys.stdin" not in processes()[own.pid][1]:
            time.sleep(0.01)
        found = processes()
        assert found[own.pid][0] == os.getpid()
        assert found[own.pid][1].endswith("\\xff\\xfe stranger ")
        assert 1 not in found or os.getpid() == 1
        assert os.getppid() not in found
        assert own.stdin is not None
        own.stdin.close()


@pytest.mark.parametrize("error", [OSError("no socket"), PermissionError(13, "Permission denied")])
def test_ray_that_raises_an_oserror(
    command: list[Any], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """As where its folder for sessions cannot be made."""
    import ray

    def init(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    words = error.strerror or "no socket"
    refused(2, *command, "--ray", "local", parts=("Ray cannot be started here: ", words))
