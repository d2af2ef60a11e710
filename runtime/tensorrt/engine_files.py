"""What lies in a bundle's engines/: finished engines, and from what each was built.

    engines/
      tensorrt-10.3.0-sm87-fp16/    one folder a target
        engine.json                 the target, and of every plan its size, sha256 and key
        step.plan, decoder.plan …   serialized engines, one a graph
        timing.cache                what TensorRT measured; shortens the next build

An engine runs where it was built and nowhere else: on that device, with that version of TensorRT.
It also goes stale with its source. All of it is checked here, before TensorRT sees a byte; no
TensorRT is needed for that.
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

ENGINES = "engines"
ENGINE_JSON = "engine.json"
ENGINE_JSON_BYTES = 4 << 20
MAX_PLAN_BYTES = 1 << 40
TIMING_CACHE = "timing.cache"
OLD_TEMPORARY = ".partial"  # what older versions called a file that they were writing
SCHEMA_VERSION = 1
RECIPE = 1  # goes up when `network.py` builds other engines from the same input

Bytes = bytes | memoryview


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """One plan as engine.json describes it.

    Attributes:
        graph: the graph it was built from; also the engine's name.
        file: name of the plan in the target's folder.
        key: of what it was built from, see `engine_key`.
        profiles: optimisation profiles in it; 1 for a static graph.
        seconds: that the build took.
        options: it was built with.
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
    """engine.json of one target, read. A change makes a new one: see `add_engine`.

    Attributes:
        path: where it lies.
        target: what it says of itself, which need not be what its name says.
        engines: graph → record.
        timing_cache: None before the first build.
    """

    bundle: Path
    path: Path
    target: Target
    engines: Mapping[str, EngineRecord] = field(default_factory=dict)
    timing_cache: FileInfo | None = None

    def record(self, graph: str) -> EngineRecord:
        """Raises BackendError where the engine was not built."""
        if graph not in self.engines:
            built = ", ".join(self.engines) or "none"
            raise BackendError(
                f"{self.path} has no engine of {graph} (it has {built}); "
                f"run {build_command(self.bundle, self.target, graph)}"
            )
        return self.engines[graph]

    def intact(self, record: EngineRecord) -> bool:
        """Whether the plan lies there with the bytes that were written."""
        path = self.path / record.file
        try:
            return path.stat().st_size == record.size and file_sha256(path) == record.sha256
        except OSError:
            return False


def graph_profiles(
    manifest: Manifest, precision: str, graph: str
) -> list[dict[str, tuple[int, ...]]]:
    """Input shapes of every optimisation profile: one a scale for `step`, none where the graph
    is static."""
    if graph != names.STEP:
        return []
    return [step_shapes(manifest, precision, k) for k in range(manifest.model.scales)]


def engine_key(
    manifest: Manifest, graph: str, precision: str, options: BuildOptions, target: Target
) -> str:
    """Hash over everything that an engine is made of: where it is the same, so is the engine.

    Raises BundleError where the bundle lacks the graph.
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
    # of the other graphs every build makes those that it was not told to leave out
    if graph is not None and graph not in names.FIXED_GRAPHS:
        words += ["--layout", "per-scale"]
    if target.library != "tensorrt":
        words += ["--library", target.library]
        if target.device == ANY_DEVICE:
            words += ["--compute-capability", str(target.sm)]
    return shlex.join(words)


def new_folder(bundle: Path, target: Target) -> EngineFolder:
    """The place of a target's engines, with none in it."""
    return EngineFolder(bundle=bundle, path=bundle / ENGINES / target.folder, target=target)


def read_engines(bundle: Path, target: Target) -> EngineFolder:
    """The engines of a target; without any where its folder is missing.

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
    """What the engine.json of a folder says it is for.

    Raises BackendError where it says nothing that could be read.
    """
    file = path / ENGINE_JSON
    try:
        return Target(**json.loads(file.read_text(encoding="utf-8"))["target"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BackendError(
            f"{file} cannot be read ({error!r}); delete {path} and run var-deploy build"
        ) from None


def engine_folders(bundle: Path) -> list[EngineFolder]:
    """The folders of engines in a bundle that can be read and lie where their target says."""
    found = []
    for path in _target_folders(bundle):
        with contextlib.suppress(BackendError):
            folder = read_engines(bundle, folder_target(path))
            found += [folder] if folder.path == path else []
    return found


def copy_engines(
    folder: EngineFolder, bundle: Path, place: Callable[[Path, Path], None]
) -> EngineFolder:
    """The engines of a target and their timing cache in another bundle, where nothing uses them
    yet.

    `place` puts one file at a new path. A file that engine.json does not name is left behind, and
    so is one whose bytes there are not those that were written: a link is followed for its content
    alone. Raises BackendError where the disk refuses.
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
    """The engines of a target, for use.

    Raises BackendError where there are none (naming the targets that there are), or where those
    of that name were built for another device or version.
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
    """An engine of the bundle, all checks passed; raises BackendError as they do."""
    folder = find_target(bundle, target)
    record = folder.record(graph)
    key = engine_key(manifest, graph, target.precision, record.options, folder.target)
    return record, check_engine(folder, record, target, key)


def check_engine(
    folder: EngineFolder, record: EngineRecord, expected_target: Target, key: str
) -> bytes:
    """The plan's bytes, once nothing speaks against handing them to TensorRT.

    Raises BackendError for another device, version or precision than `expected_target`, another
    source than `key` stands for, and a plan that is missing, truncated or changed.
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
    return hashlib.sha256(plan).hexdigest()


def add_engine(folder: EngineFolder, plan: Bytes, record: EngineRecord) -> EngineFolder:
    """Write a plan, then engine.json; a crash in between leaves a plan that nothing refers to.

    Raises BackendError where the disk refuses; what was there before is still there then.
    """
    _replace_file(folder.path / record.file, plan)
    return _save(dataclasses.replace(folder, engines={**folder.engines, record.graph: record}))


def add_timing_cache(folder: EngineFolder, data: bytes) -> EngineFolder:
    """Write the timing cache and its hash. Raises BackendError where the disk refuses."""
    _replace_file(folder.path / TIMING_CACHE, data)
    info = FileInfo(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return _save(dataclasses.replace(folder, timing_cache=info))


def read_timing_cache(folder: EngineFolder) -> bytes | None:
    """The timing cache, b"" where there is none yet, None where it is not what was written."""
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
    """Delete what a build that was cut off left, and what engine.json does not know."""
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
    """Write by rename, so that a file is never half there; a link is replaced, not followed."""
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
        # a name in this folder, and in no other
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
