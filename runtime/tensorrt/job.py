"""Builds one engine of a bundle, in this process or in a child process.

`python -m var_deploy.runtime.tensorrt.job` is the child: it reads a request on stdin and writes
JSON lines to stdout. Memory that TensorRT holds after a build is freed when the child ends, so that
the next build has all of it; and where memory runs out, the child is killed and not the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from var_deploy.bundle.files import BundleFiles
from var_deploy.errors import BackendError, BundleChangedError, VarDeployError
from var_deploy.host.installation import module_command
from var_deploy.host.terminal import INTERRUPTED
from var_deploy.manifest import read_manifest
from var_deploy.progress import Progress
from var_deploy.runtime.tensorrt import engine_files
from var_deploy.runtime.tensorrt.engine_files import EngineFolder, EngineRecord
from var_deploy.runtime.tensorrt.library import Library
from var_deploy.runtime.tensorrt.monitor import held_interrupt
from var_deploy.runtime.tensorrt.network import build_engine
from var_deploy.runtime.tensorrt.target import BuildOptions, Target

KILLED = 9  # the signal that Linux sends to a process when memory runs out
PROGRESS_PAUSE = 0.1  # seconds between two lines


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One engine to build; can be sent to a child process as JSON."""

    bundle: Path
    graph: str
    precision: str
    key: str
    options: BuildOptions
    target: Target

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bundle": str(self.bundle)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildJob:
        return cls(
            bundle=Path(data["bundle"]),
            graph=data["graph"],
            precision=data["precision"],
            key=data["key"],
            options=BuildOptions(**data["options"]),
            target=Target(**data["target"]),
        )


def run_job(job: BuildJob, library: Library, progress: Progress) -> list[str]:
    """Build one engine and add it to the bundle. Returns notes; raises as `build_engine`."""
    manifest = read_manifest(job.bundle)
    files = BundleFiles(job.bundle, manifest, job.precision)
    files.read(job.graph)  # the parser reads it by path: checked before and after the build
    if job.key != engine_files.engine_key(
        manifest, job.graph, job.precision, job.options, job.target
    ):
        raise BundleChangedError(f"the bundle at {job.bundle} was replaced; start the build again")
    folder, notes = open_folder(job.bundle, job.target)
    cache = engine_files.read_timing_cache(folder)
    if cache is None:
        path = folder.path / engine_files.TIMING_CACHE
        notes.append(f"{path} is damaged and was ignored; a new one is begun")
    profiles = engine_files.graph_profiles(manifest, job.precision, job.graph)
    # an engine that was finished when Ctrl-C came is kept
    with held_interrupt() as interrupt:
        built = build_engine(
            library,
            job.bundle / manifest.graph(job.precision, job.graph).file,
            profiles,
            job.options,
            timing_cache=cache or b"",
            on_progress=progress,
            cancelled=lambda: interrupt.pressed,
        )
        files.confirm(job.graph)
        files.close()
        record = EngineRecord(
            graph=job.graph,
            file=f"{job.graph}.plan",
            size=built.plan.nbytes,
            sha256=engine_files.plan_sha256(built.plan),
            key=job.key,
            profiles=max(len(profiles), 1),
            seconds=round(built.seconds, 3),
            options=job.options,
        )
        folder = engine_files.add_engine(folder, built.plan, record)
        if built.timing_cache:
            engine_files.add_timing_cache(folder, built.timing_cache)
    return [*notes, *built.notes]


def open_folder(bundle: Path, target: Target) -> tuple[EngineFolder, list[str]]:
    """Read the target's engine folder; an empty one, with a note, where it cannot be used."""
    try:
        folder = engine_files.read_engines(bundle, target)
    except BackendError as error:
        what = str(error).partition("; ")[0]
        return engine_files.new_folder(bundle, target), [f"{what}; the engines are built anew"]
    if folder.target != target:
        note = f"{folder.path} held engines for {folder.target.describe()}; they are replaced"
        return engine_files.new_folder(bundle, target), [note] if folder.engines else []
    return folder, []


def run_in_child(job: BuildJob, library: Library, progress: Progress) -> list[str]:
    """Run `run_job` in a child process. Raises BackendError also where the child is killed."""
    request = {"job": job.to_json(), "module": library.module.__name__}
    last: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            module_command("var_deploy.runtime.tensorrt.job"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as child,
    ):
        try:
            _send(child.stdin, request)
            for line in child.stdout or ():
                message = _message(line)
                if "progress" in message:
                    progress(*message["progress"])
                last = message or last
            code = child.wait()
        except BaseException:  # Ctrl-C, or a failing callback: the child stops after a step
            with contextlib.suppress(ValueError):  # Windows tells it by itself
                child.send_signal(signal.SIGINT)
            child.wait()
            raise
        errors.seek(0)
        complaint = errors.read().strip().rpartition("\n")[2]
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == 0 and "notes" in last:
        return list(last["notes"])
    if "error" in last:
        raise BackendError(last["error"])
    raise BackendError(_death(job, code, complaint))


def _death(job: BuildJob, code: int, complaint: str) -> str:
    if code == -KILLED:
        return (
            f"the build of {job.graph} was killed (signal 9): memory ran out, most likely; close "
            "other programs, add swap, or try --workspace 256 or a lower --optimization-level; "
            "what is finished is kept"
        )
    what = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the build of {job.graph} ended with {what}: {complaint or 'it left no message'}"


def _send(stream: IO[str] | None, request: Mapping[str, Any]) -> None:
    assert stream is not None
    with contextlib.suppress(BrokenPipeError), stream:  # the exit code tells why it is gone
        json.dump(request, stream)


def _message(line: str) -> dict[str, Any]:
    """Parse a line of the child's stdout; {} for a line that a library printed."""
    try:
        message = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return message if isinstance(message, dict) else {}


def main() -> int:
    """Read a request on stdin and build; the last line on stdout has notes or the error."""
    lock, told = threading.Lock(), 0.0

    def tell(**message: Any) -> None:
        with lock:
            print(json.dumps(message), flush=True)

    def progress(text: str, fraction: float) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_PAUSE:
            told = time.monotonic()
            tell(progress=[text, fraction])

    try:
        request = json.load(sys.stdin)
        job = BuildJob.from_json(request["job"])
        library = Library(importlib.import_module(request["module"]), job.target.library)
        tell(notes=run_job(job, library, progress))
    except KeyboardInterrupt:
        return INTERRUPTED
    except VarDeployError as error:
        tell(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
