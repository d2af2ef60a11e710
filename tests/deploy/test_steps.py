"""The image for CPUs without a container engine: the steps of deploy/Dockerfile, read from it, are
run in fresh virtual environments, and what it starts is asked, watched and stopped."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from deploy.dockerfile import ROOT, Stage, read_stages
from PIL import Image

from cli_steps import tree

PATIENCE = 60
PYTHON_IMAGE = r"python:3\.\d+-slim-\w+"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="the image is a Linux one"),
]


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Folders that stand for the file systems of the stages. A stage that starts from Python's
    image starts from a new virtual environment of this Python."""

    folder: Path

    def begin(self, stage: Stage) -> None:
        assert re.fullmatch(PYTHON_IMAGE, stage.base), stage.base
        (self.folder / stage.name).mkdir()
        self._call([sys.executable, "-m", "venv", str(self.folder / stage.name / "python")])

    def run(self, stage: Stage) -> None:
        """COPY and RUN, in order. Paths of the image become paths below the stage's folder."""
        root = self.folder / stage.name
        workdir = root
        for step in stage.steps:
            if step.keyword == "WORKDIR":
                workdir = root / step.text.lstrip("/")
                workdir.mkdir()
            elif step.keyword == "COPY":
                *sources, to = step.words()
                for source in sources:
                    _copy(ROOT / source, workdir / (source if to == "./" else to))
            elif step.keyword == "RUN":
                places = {"/dist": root / "dist"}
                for mount in step.mounts():
                    origin = self.folder / mount["from"] if "from" in mount else ROOT
                    places[mount["target"]] = origin / mount["source"].lstrip("/")
                text = step.text
                for path, place in places.items():
                    text = re.sub(rf"(?<![\w./]){re.escape(path)}\b", str(place), text)
                self._call(["sh", "-ec", text], stage, cwd=workdir)

    def environment(self, stage: Stage, **more: str) -> dict[str, str]:
        """What the stage's processes see. Of the one outside only pip's settings remain."""
        programs = self.folder / stage.name / "python" / "bin"
        outside = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k == "HOME"}
        return {**outside, "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin", **more}

    def _call(self, command: list[str], stage: Stage | None = None, cwd: Path = ROOT) -> None:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment(stage) if stage else None,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _copy(source: Path, to: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, to)


@dataclass(frozen=True, kw_only=True)
class Running:
    """How the image starts a process."""

    sandbox: Sandbox
    stage: Stage
    env: dict[str, str]

    def command(self, words: list[str]) -> list[str]:
        """`words` as the image's user on a read-only system, where that may be done here."""
        if not may_confine():
            return words
        user, _, group = self.stage.last("USER").text.partition(":")
        identity = f"--reuid {user} --regid {group} --clear-groups --no-new-privs"
        if _private(Path(sys.base_prefix)):
            # this Python lies in root's own folder: it may be read, and nothing be written
            identity += " --inh-caps=-all,+dac_read_search --ambient-caps=+dac_read_search"
        else:
            identity += " --inh-caps=-all --bounding-set=-all"
        locked = (
            f"mount -t tmpfs -o mode=1777 tmpfs {self.env['HOME']}; "
            f"mount -o remount,bind,ro /; exec setpriv {identity} {shlex.join(words)}"
        )
        return ["unshare", "--mount", "sh", "-ec", locked]

    def healthy(self) -> bool:
        done = subprocess.run(
            self.command(self.stage.healthcheck()),
            env=self.env,
            capture_output=True,
            timeout=PATIENCE,
        )
        return done.returncode == 0


@cache
def may_confine() -> bool:
    """Whether this process may mount, for itself, and become another user: root mostly may."""
    try:
        done = subprocess.run(["unshare", "--mount", "setpriv", "--reuid", "1", "true"])
    except FileNotFoundError:
        return False
    return done.returncode == 0


def _private(path: Path) -> bool:
    """Whether others than its owner cannot reach it."""
    return not all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Below /tmp, since pytest's own folders are for their owner alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Sandbox(folder=Path(name))


@pytest.fixture(scope="module")
def runtime(sandbox: Sandbox) -> Stage:
    """The runtime for CPUs, installed."""
    stages = read_stages()
    for name in ("wheel", "cpu"):
        sandbox.begin(stages[name])
        sandbox.run(stages[name])
    last = stages["runtime"]
    assert last.base == "cpu", "the default"
    assert not last.of("RUN") and not last.of("COPY")
    return Stage(name="cpu", base=last.base, steps=[*stages["cpu"].steps, *last.steps])


@pytest.fixture(scope="module")
def running(sandbox: Sandbox, runtime: Stage, pocket_bundle: Path) -> Running:
    _copy(pocket_bundle, sandbox.folder / "bundle")
    (sandbox.folder / "tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        **runtime.env(),
        "HOME": str(sandbox.folder / "tmp"),  # /tmp there
        # what `docker run` may set too: a port that is free here, and nobody else is let in
        "VAR_DEPLOY_SERVE_HOST": "127.0.0.1",
        "VAR_DEPLOY_SERVE_PORT": str(port),
        "VAR_DEPLOY_SERVE_THREADS": "1",
    }
    return Running(sandbox=sandbox, stage=runtime, env=sandbox.environment(runtime, **settings))


def test_only_the_runtime_is_installed(sandbox: Sandbox, runtime: Stage) -> None:
    python = sandbox.folder / "cpu" / "python" / "bin" / "python"
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
        capture_output=True,
        check=True,
    )
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert {"var-deploy", "onnxruntime", "numpy", "fastapi", "uvicorn"} <= names
    assert not names & {"torch", "onnx", "build", "pytest", "safetensors"}


def test_the_service_starts_is_asked_and_stops(running: Running) -> None:
    bundle = running.sandbox.folder / "bundle"
    before = tree(bundle)
    assert not running.healthy(), "nobody is there yet"
    start = [*running.stage.last("ENTRYPOINT").words(), *running.stage.last("CMD").words()]
    words = [str(bundle) if word == "/bundle" else word for word in start]
    with subprocess.Popen(
        running.command(words),
        cwd="/",
        env=running.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = f"http://127.0.0.1:{running.env['VAR_DEPLOY_SERVE_PORT']}"
            assert line == f"serving {bundle} on {address} (Ctrl-C stops)\n", process.communicate()
            _wait(running)
            if may_confine():
                _see_who_runs(process.pid, running)
            body = json.dumps({"labels": ["star"], "seed": 7, "format": "png"}).encode()
            request = urllib.request.Request(
                f"{address}/v1/images", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                picture = Image.open(io.BytesIO(answer.read()))
            assert picture.size == (64, 64)
            process.terminate()
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    *waited, drawn = [line.split()[3:6] for line in err.splitlines()]  # the log, and nothing else
    assert drawn == ["POST", "/v1/images", "200"]
    assert waited and all(line == ["GET", "/health", "200"] for line in waited)
    assert tree(bundle) == before
    assert not running.healthy()
    if not may_confine():
        pytest.skip("done, but neither as the image's user nor read-only, which needs root here")


def _wait(running: Running) -> None:
    """Until the health check says yes."""
    end = time.monotonic() + PATIENCE
    while not running.healthy():
        assert time.monotonic() < end, "never healthy"


def _see_who_runs(pid: int, running: Running) -> None:
    """That the process is the program itself, as the user of the image, and cannot write."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert status["Name"] == "var-deploy", "which the signal reaches"
    user, _, group = running.stage.last("USER").text.partition(":")
    assert set(status["Uid"].split()) == {user} and set(status["Gid"].split()) == {group}
    assert status["NoNewPrivs"] == "1"
    mounts = Path(f"/proc/{pid}/mounts").read_text().splitlines()
    (root,) = (line.split() for line in mounts if line.split()[1] == "/")
    assert "ro" in root[3].split(","), "the system is read-only"
