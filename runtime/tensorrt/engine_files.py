"""Reads and writes a bundle's folder engines/: finished engines and what each was built from.

    engines/
      tensorrt-10.3.0-sm87-fp16/    one folder per target
        engine.json                 the target; size, sha256 and key of every plan
        step.plan, decoder.plan …   serialized engines, one per graph
        timing.cache                timings of TensorRT; shortens the next build

An engine runs only on the device and with the TensorRT version that it was built for, and it is
out of date where graphs or weights have changed. Both are checked here, without TensorRT, before
TensorRT reads an engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from var_deploy import names
from var_deploy.bundle.json_values import DamagedError, Value, read_json, shown
from var_deploy.errors import BackendError, UsageError, one_line
from var_deploy.files import remove_dead_files, whole_file
from var_deploy.files.held_files import HeldFile
from var_deploy.manifest import FileInfo, Manifest, file_sha256
from var_deploy.runtime.buffers import step_shapes
from var_deploy.runtime.tensorrt.target import ANY_DEVICE, BuildOptions, Target

ENGINES = names.ENGINES
ENGINE_JSON = "engine.json"
ENGINE_JSON_BYTES = 4 << 20
MAX_PLAN_BYTES = 1 << 40
TIMING_CACHE = "timing.cache"
OLD_TEMPORARY = ".partial"  # suffix of unfinished files of older versions
SCHEMA_VERSION = 1
RECIPE = 1  # increased when `network.py` builds other engines from the same input

Bytes = bytes | memoryview


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Entry of engine.json for one plan (a serialized engine).

    Attributes:
        graph: name of the graph that it was built from, and of the engine.
        file: name of the plan in the target's folder.
        key: hash of everything that it was built from, see `engine_key`.
        profiles: number of optimisation profiles; 1 for a static graph.
        seconds: duration of the build.
        options: options of the build.
    """

    graph: str
    file: str
    size: int
    sha256: str
    key: str
    profiles: int
    seconds: float
    options: BuildOptions = field(default_factory=BuildOptions)


@dataclass(frozen=True, kw_only=True)
class EngineFolder:
    """The contents of one target's engine.json. Immutable: `add_engine` returns a new one.

    Attributes:
        path: the folder of engine.json.
        target: the target in engine.json, which may differ from the folder's name.
        engines: graph → record.
        timing_cache: size and hash of the timing cache; None before the first build.
    """

    bundle: Path
    path: Path
    target: Target
    engines: Mapping[str, EngineRecord] = field(default_factory=dict)
    timing_cache: FileInfo | None = None

    def record(self, graph: str) -> EngineRecord:
        """The record of a graph's engine. Raises BackendError where the engine was not built."""
        if graph not in self.engines:
            built = ", ".join(self.engines) or "none"
            raise BackendError(
                f"{self.path} has no engine of {graph} (it has {built}); "
                f"run {build_command(self.bundle, self.target, graph)}"
            )
        return self.engines[graph]

    def intact(self, record: EngineRecord) -> bool:
        """Whether the plan file exists with the size and hash of its record."""
        path = self.path / record.file
        try:
            return path.stat().st_size == record.size and file_sha256(path) == record.sha256
        except OSError:
            return False


def graph_profiles(
    manifest: Manifest, precision: str, graph: str
) -> list[dict[str, tuple[int, ...]]]:
    """Input shapes of every optimisation profile: one profile per scale for `step`, none for a
    static graph."""
    if graph != names.STEP:
        return []
    return [step_shapes(manifest, precision, k) for k in range(manifest.model.scales)]


def engine_key(
    manifest: Manifest, graph: str, precision: str, options: BuildOptions, target: Target
) -> str:
    """Hash of everything that an engine is built from: graph, weights, profiles, options, target.

    An engine is up to date where its key has not changed. Raises BundleError where the bundle lacks
    the graph.
    """
    file = manifest.graph(precision, graph).file
    weights = manifest.files.get(f"{precision}/{names.WEIGHTS}")
    parts = {
        "recipe": RECIPE,
        "graph": manifest.files[file].sha256,
        "weights": weights.sha256 if weights else None,
        "profiles": graph_profiles(manifest, precision, graph),
        "options": dataclasses.asdict(options),
        "target": dataclasses.asdict(target),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build_command(bundle: Path, target: Target, graph: str | None = None) -> str:
    """The command that builds the engines of a target, or one that includes `graph`."""
    words = ["var-deploy", "build", str(bundle), "--precision", target.precision]
    # every build includes the other graphs, unless an option leaves them out
    if graph is not None and graph not in names.FIXED_GRAPHS:
        words += ["--layout", "per-scale"]
    if target.library != "tensorrt":
        words += ["--library", target.library]
        if target.device == ANY_DEVICE:
            words += ["--compute-capability", str(target.sm)]
    return shlex.join(words)


def new_folder(bundle: Path, target: Target) -> EngineFolder:
    """An `EngineFolder` of a target without engines."""
    return EngineFolder(bundle=bundle, path=bundle / ENGINES / target.folder, target=target)


def read_engines(bundle: Path, target: Target) -> EngineFolder:
    """Read the engine.json of a target; an empty `EngineFolder` where the file is missing.

    Raises BackendError where engine.json is damaged or from a newer version.
    """
    folder = new_folder(bundle, target)
    path = folder.path / ENGINE_JSON
    again = f"run {build_command(bundle, target)}"
    try:
        data = read_json(path, ENGINE_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return folder
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or one_line(error)
        raise BackendError(f"{path} cannot be read ({words}); {again}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BackendError(
            f"{path} has schema version {shown(version)}, this var-deploy reads up to "
            f"{SCHEMA_VERSION}; upgrade var-deploy or {again}"
        )
    try:
        return _parse(folder, Value(data))
    except (DamagedError, UsageError) as error:
        raise BackendError(f"{path} is damaged ({error}); {again}") from None


def folder_target(path: Path) -> Target:
    """The target in the engine.json of a folder.

    Raises BackendError where engine.json cannot be read.
    """
    file = path / ENGINE_JSON
    try:
        return Target(**json.loads(file.read_text(encoding="utf-8"))["target"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BackendError(
            f"{file} cannot be read ({error!r}); delete {path} and run var-deploy build"
        ) from None


def engine_folders(bundle: Path) -> list[EngineFolder]:
    """All readable engine folders of a bundle whose names agree with their targets."""
    found = []
    for path in _target_folders(bundle):
        with contextlib.suppress(BackendError):
            folder = read_engines(bundle, folder_target(path))
            found += [folder] if folder.path == path else []
    return found


def copy_engines(
    folder: EngineFolder, bundle: Path, place: Callable[[Path, Path], None]
) -> EngineFolder:
    """Copy the engines of a target and their timing cache to another bundle, not yet in use.

    `place` links or copies one file to a new path. Files that engine.json does not name, or whose
    size or hash differ from it, are not copied. Raises BackendError where the disk cannot be
    written.
    """
    new = dataclasses.replace(
        folder, bundle=bundle, path=bundle / ENGINES / folder.path.name, engines={},
        timing_cache=None,
    )  # fmt: skip
    wanted = {r.file: FileInfo(size=r.size, sha256=r.sha256) for r in folder.engines.values()}
    wanted |= {TIMING_CACHE: folder.timing_cache} if folder.timing_cache else {}
    there = set()
    for name, info in wanted.items():
        source, target = folder.path / name, new.path / name
        if source.is_file() and source.stat().st_size == info.size:
            place(source, target)
            if file_sha256(target) == info.sha256:
                there.add(name)
            else:
                target.unlink()
    return _save(
        dataclasses.replace(
            new,
            engines={graph: r for graph, r in folder.engines.items() if r.file in there},
            timing_cache=folder.timing_cache if TIMING_CACHE in there else None,
        )
    )


def find_target(bundle: Path, target: Target) -> EngineFolder:
    """Find the engines of a target, to run them.

    Raises BackendError where the bundle has none (the message names the targets that it has), or
    where those in the target's folder were built for another device or version.
    """
    folder = read_engines(bundle, target)
    if not folder.engines:
        there = [f.name for f in _target_folders(bundle) if f.name != target.folder]
        what = f"it has {', '.join(there)}" if there else "nothing was built yet"
        raise BackendError(
            f"{bundle} has no engines for {target.describe()} ({what}); "
            f"run {build_command(bundle, target)}"
        )
    _refuse_other_target(folder, target)
    return folder


def load_plan(
    bundle: Path, manifest: Manifest, graph: str, target: Target
) -> tuple[EngineRecord, bytes]:
    """Load an engine: its record and bytes. Raises BackendError where a check fails."""
    folder = find_target(bundle, target)
    record = folder.record(graph)
    key = engine_key(manifest, graph, target.precision, record.options, folder.target)
    return record, check_engine(folder, record, target, key)


def check_engine(
    folder: EngineFolder, record: EngineRecord, expected_target: Target, key: str
) -> bytes:
    """Check an engine and return the bytes of its plan, safe to deserialize.

    Raises BackendError for a device, version or precision other than `expected_target`, for a key
    other than `key`, and for a plan that is missing, truncated or changed.
    """
    _refuse_other_target(folder, expected_target)
    path = folder.path / record.file
    again = f"run {build_command(folder.bundle, expected_target, record.graph)}"
    if record.key != key:
        raise BackendError(
            f"{path} was built from other graphs, weights or settings than the bundle holds now "
            f"(key {record.key[:12]}, expected {key[:12]}); {again}"
        )
    try:
        file = HeldFile(path)
        try:
            if file.size != record.size:
                raise BackendError(
                    f"{path} has {file.size} bytes, expected {record.size}: it is truncated or was "
                    f"replaced; {again}"
                )
            plan = file.read()
        finally:
            file.close()
    except FileNotFoundError:
        raise BackendError(f"{path} is missing; {again}") from None
    except OSError as error:
        raise BackendError(f"{path} cannot be read ({error.strerror}); {again}") from None
    found = plan_sha256(plan)
    if found != record.sha256:
        raise BackendError(
            f"{path} does not match its hash in {ENGINE_JSON} (sha256 {found[:12]}, expected "
            f"{record.sha256[:12]}): it is damaged; {again}"
        )
    return plan


def plan_sha256(plan: Bytes) -> str:
    """SHA-256 of a plan, as it stands in engine.json."""
    return hashlib.sha256(plan).hexdigest()


def add_engine(folder: EngineFolder, plan: Bytes, record: EngineRecord) -> EngineFolder:
    """Write a plan, then engine.json; a crash in between leaves a plan that is not listed.

    Raises BackendError where the disk cannot be written; the old files are then unchanged.
    """
    _replace_file(folder.path / record.file, plan)
    return _save(dataclasses.replace(folder, engines={**folder.engines, record.graph: record}))


def add_timing_cache(folder: EngineFolder, data: bytes) -> EngineFolder:
    """Write the timing cache and its hash. Raises BackendError where the disk is not writable."""
    _replace_file(folder.path / TIMING_CACHE, data)
    info = FileInfo(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return _save(dataclasses.replace(folder, timing_cache=info))


def read_timing_cache(folder: EngineFolder) -> bytes | None:
    """Read the timing cache: b"" where there is none yet, None where it is damaged."""
    path = folder.path / TIMING_CACHE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b"" if folder.timing_cache is None else None
    except OSError:
        return None
    info = folder.timing_cache
    good = info is not None and hashlib.sha256(data).hexdigest() == info.sha256
    return data if good else None


def remove_leftovers(folder: EngineFolder) -> None:
    """Delete files of interrupted builds, and plans that engine.json does not list."""
    known = {record.file for record in folder.engines.values()}
    if folder.timing_cache is not None:
        known.add(TIMING_CACHE)
    remove_dead_files(folder.path)
    for path in folder.path.iterdir():
        ours = path.suffix in (".plan", ".cache", OLD_TEMPORARY)
        if ours and path.name not in known:
            path.unlink(missing_ok=True)


def _refuse_other_target(folder: EngineFolder, wanted: Target) -> None:
    found = folder.target
    if not found.serves(wanted):
        raise BackendError(
            f"{folder.path} was built for {found.describe()}, needed is {wanted.describe()}; "
            f"run {build_command(folder.bundle, wanted)}"
        )


def _target_folders(bundle: Path) -> list[Path]:
    return sorted(path.parent for path in (bundle / ENGINES).glob(f"*/{ENGINE_JSON}"))


def _save(folder: EngineFolder) -> EngineFolder:
    data = {
        "schema_version": SCHEMA_VERSION,
        "target": dataclasses.asdict(folder.target),
        "engines": [dataclasses.asdict(record) for record in folder.engines.values()],
        "timing_cache": folder.timing_cache and dataclasses.asdict(folder.timing_cache),
    }
    _replace_file(folder.path / ENGINE_JSON, (json.dumps(data, indent=1) + "\n").encode())
    return folder


def _replace_file(path: Path, data: Bytes) -> None:
    """Write a file atomically, by rename; a symbolic link is replaced, not followed."""
    with whole_file(path, error=BackendError, follow=False) as stream:
        stream.write(data)


def _parse(folder: EngineFolder, data: Value) -> EngineFolder:
    """Raises DamagedError and, for options out of range, UsageError."""
    target = data.member("target").only("library", "version", "device", "sm", "precision")
    texts = {name: target.member(name).text() for name in target.members() if name != "sm"}
    records = [_record(item) for item in data.member("engines").items(1000)]
    cache = data.member("timing_cache")
    try:
        known = Target(**texts, sm=target.member("sm").whole(0, 10_000))
    except TypeError as error:
        raise DamagedError(f"target is incomplete: {error}") from None
    return dataclasses.replace(
        folder,
        target=known,
        engines={record.graph: record for record in records},
        timing_cache=_file_info(cache) if cache.raw else None,
    )


def _record(data: Value) -> EngineRecord:
    options = data.only(*(f.name for f in dataclasses.fields(EngineRecord))).member("options")
    options.only(*(f.name for f in dataclasses.fields(BuildOptions)))
    chosen = {
        name: value.whole(0, 1 << 40)
        for name, value in options.members().items()
        if value.raw is not None or name == "optimization_level"
    }
    info = _file_info(data)
    return EngineRecord(
        graph=data.member("graph").text(),
        # a file name without a folder
        file=data.member("file").text(r"[^\\/\x00-\x1f]+\.[a-z]+", "the name of a plan"),
        size=info.size,
        sha256=info.sha256,
        key=data.member("key").text(),
        profiles=data.member("profiles").whole(0, 1000),
        seconds=data.member("seconds").number(0, 1e9),
        options=BuildOptions(**chosen),
    )


def _file_info(data: Value) -> FileInfo:
    return FileInfo(
        size=data.member("size").whole(0, MAX_PLAN_BYTES), sha256=data.member("sha256").text()
    )
