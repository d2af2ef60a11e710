"""Starts the server of the wheel `nvidia-pytriton`, and asks it with NVIDIA's own client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENVIRONMENT = Path(__file__).parents[2] / ".venv" / "triton"  # `make test` sets it up
PYTHON = ENVIRONMENT / "bin" / "python"
STUB = "triton_python_backend_stub"
CLIENT = Path(__file__).parent / "client_script.py"
MODEL = "small"
PATIENCE = 300  # seconds, for a machine that is busy with something else

Answers = dict[str, NDArray[Any]]


class CannotRunError(Exception):
    """The server cannot be started here, for a reason that is not ours."""


@dataclass(frozen=True, kw_only=True)
class Triton:
    """A server on this machine."""

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    log: Path

    def ask(
        self, protocol: str, folder: Path, *questions: Mapping[str, Any], model: str = MODEL
    ) -> Answers:
        """Ask all of them at once; see client_script.py."""
        asked, answers = folder / "questions.json", folder / "answers.npz"
        asked.write_text(json.dumps(questions))
        address = f"127.0.0.1:{self.http if protocol == 'http' else self.grpc}"
        command = [PYTHON, CLIENT, protocol, address, model, asked, answers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        with np.load(answers) as found:
            return dict(found)

    def batches(self) -> tuple[int, int]:
        """(images, executions) so far."""
        found = json.loads(self.get(f"/v2/models/{MODEL}/stats")[1])["model_stats"][0]
        return found["inference_count"], found["execution_count"]

    def get(self, path: str, method: str = "GET", body: str | None = None) -> tuple[int, bytes]:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.http, timeout=PATIENCE)
        ) as connection:
            connection.request(method, path, body)
            reply = connection.getresponse()
            return reply.status, reply.read()

    def wait_until_ready(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError):
                if self.get("/v2/health/ready")[0] == 200:
                    return
            waiting = self.process.poll() is None and time.monotonic() < end
            assert waiting, f"tritonserver is not ready:\n{self.last_words()}"
            time.sleep(0.1)

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def wheel() -> Path:
    """The server's folder in the wheel. Raises CannotRunError."""
    found = sorted(ENVIRONMENT.glob("lib/python*/site-packages/pytriton/tritonserver"))
    if not found:
        raise CannotRunError("nvidia-pytriton is not installed in .venv/triton")
    return found[0]


def backends(scratch: Path) -> Path:
    """A copy of the wheel's backends with the stub for this Python. Raises CannotRunError."""
    source = wheel()
    version = source.parts[-4].removeprefix("python")
    stub = source / "python_backend_stubs" / version / STUB
    for program in (source / "bin" / "tritonserver", stub):
        if not program.is_file():
            raise CannotRunError(f"nvidia-pytriton has no {program.name} for Python {version}")
        if missing := missing_libraries(program):
            raise CannotRunError(f"{program.name} of nvidia-pytriton needs {missing}")
    folder = Path(shutil.copytree(source / "backends", scratch / "backends"))
    placed = Path(shutil.copyfile(stub, folder / "python" / STUB))
    placed.chmod(0o755)
    return folder


def missing_libraries(program: Path) -> str:
    """Shared libraries that a program needs and the system lacks; "" where it can run."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if done.returncode:  # a program for another kind of machine
        return done.stderr.strip() or "another machine"
    return ", ".join(line.split()[0] for line in done.stdout.splitlines() if "not found" in line)


@contextlib.contextmanager
def serving(repository: Path, scratch: Path, *options: str) -> Iterator[Triton]:
    """A server of the models in `repository`. Raises CannotRunError where it does not start."""
    folder, log = backends(scratch), scratch / "log"
    http_port, grpc_port = free_ports(2)
    command = [wheel() / "bin" / "tritonserver", "--model-repository", repository]
    command += ["--backend-directory", folder, "--allow-metrics=false", *options]
    command += ["--http-address=127.0.0.1", f"--http-port={http_port}"]
    command += ["--grpc-address=127.0.0.1", f"--grpc-port={grpc_port}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # the backend's interpreter is that of the environment whose bin/ comes first
        "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}",
        # where the wheel put what the stub looks for beside its own place
        "LD_LIBRARY_PATH": str(wheel().parents[1] / "nvidia_pytriton.libs"),
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        server = Triton(process=process, http=http_port, grpc=grpc_port, log=log)
        server.wait_until_ready()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
