"""manifest.json: what a bundle holds, and the checks that come before anything is loaded.

Reading refuses a bundle from a newer schema, a file that is missing, of another size or hash, and
a path that leaves the folder; each in one line that says what to do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from var_deploy import names
from var_deploy.errors import BundleError, UsageError
from var_deploy.files import whole_file
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec

# Version 2 may hold `more_smooth`, whose graphs take an input that a reader of version 1 does not
# know. Bundles without it are still written as version 1, byte for byte as before.
SCHEMA_VERSION = 2
PLAIN_VERSION = 1
HASH_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Name, NumPy dtype and shape of a graph's input or output; a string is a symbolic size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphInfo:
    """One ONNX file. `file` is relative to the bundle, with forward slashes."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weight_bytes: int  # bytes of weights.bin that this graph uses

    def input(self, name: str) -> TensorInfo:
        return next(t for t in self.inputs if t.name == name)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
        model: sizes of the model.
        preset: its name, "" where it is no preset.
        batch: B, images a launch.
        guidance: whether the graphs run 2B rows.
        more_smooth: whether the scale graphs mix codes, see `sampling.smoothing`.
        graphs: precision → graph name → graph.
        files: path in the bundle → size and hash, for every file but the manifest.
        checkpoint: where the weights came from (names and hashes, no machine paths).
        tools: versions of what wrote the bundle.
        defaults: sampling settings used where a call gives none.
        labels: class names, index = label; empty where they are not known.
        parity: the last `verify` report, None before the first.
    """

    model: ModelSpec
    preset: str
    batch: int
    guidance: bool
    graphs: Mapping[str, Mapping[str, GraphInfo]]
    files: Mapping[str, FileInfo]
    checkpoint: Mapping[str, Any]
    tools: Mapping[str, str]
    defaults: Sampling
    labels: tuple[str, ...] = ()
    parity: Mapping[str, Any] | None = None
    more_smooth: bool = False
    schema_version: int = field(default=PLAIN_VERSION)

    def __post_init__(self) -> None:
        if self.more_smooth:
            object.__setattr__(self, "schema_version", SCHEMA_VERSION)

    @property
    def rows(self) -> int:
        """G."""
        return 2 * self.batch if self.guidance else self.batch

    def graph(self, precision: str, name: str) -> GraphInfo:
        """Raises BundleError where the bundle lacks it."""
        if precision not in self.graphs:
            raise BundleError(
                f"the bundle has no {precision} graphs (it has {', '.join(self.graphs)}); "
                f"export it again with --precision {precision}"
            )
        if name not in self.graphs[precision]:
            raise BundleError(f"the bundle has no graph {name} in {precision}; export it again")
        return self.graphs[precision][name]

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        if not self.more_smooth:
            del data["more_smooth"]
        return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """Hash of what the bundle computes: changes with any graph or weight, not with a report."""
        listing = [(name, f.sha256) for name, f in sorted(self.files.items())]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def parity_is_current(self) -> bool | None:
        """Whether the stored report of `verify` was made for the files that are listed now.

        None where that is unknown: there is no report, or it is of a var-deploy that did not
        record what it was made for.
        """
        made_for = self.parity.get("digest") if isinstance(self.parity, Mapping) else None
        return made_for == self.digest() if made_for else None

    def save(self, bundle: Path) -> None:
        """Write manifest.json by rename, so that it is never half there.

        A link is replaced, not followed: in a cache it leads to a file that others share. Raises
        BundleError where the disk refuses; an older manifest is still there then.
        """
        with whole_file(bundle / names.MANIFEST, error=BundleError, follow=False) as stream:
            stream.write(self.to_json().encode())


def read_manifest(bundle: Path) -> Manifest:
    """Read and check the manifest itself (not the files that it lists).

    Raises BundleError where the folder is no bundle, the manifest is damaged, from a newer
    schema, or names a path outside the folder.
    """
    path = bundle / names.MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{bundle} is no bundle: it has no {names.MANIFEST}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{path} is not a var-deploy manifest")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this var-deploy reads up to {SCHEMA_VERSION}; "
            "upgrade var-deploy or export the bundle again"
        )
    try:
        manifest = _parse(data)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise BundleError(f"{path} is damaged ({error!r}); export the bundle again") from None
    graph_files = [g.file for p in manifest.graphs.values() for g in p.values()]
    for name in (*manifest.files, *graph_files):
        _inside(bundle, name)
    for name in graph_files:
        if name not in manifest.files:
            raise BundleError(f"{path} has no hash of {name}; export the bundle again")
    return manifest


def check_files(
    bundle: Path,
    manifest: Manifest,
    *,
    prefix: str = "",
    hashes: bool = True,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Check the listed files under `prefix`: present, of the right size, of the right hash.

    `progress` is called with the bytes read. Raises BundleError naming the first file that fails.
    """
    for name, info in sorted(manifest.files.items()):
        if not name.startswith(prefix):
            continue
        path = _inside(bundle, name)
        try:
            size = path.stat().st_size
        except OSError:
            raise BundleError(f"{path} is missing; export the bundle again") from None
        if size != info.size:
            raise BundleError(
                f"{path} has {size} bytes, expected {info.size}: it is truncated or was replaced; "
                "export the bundle again"
            )
        if hashes and file_sha256(path, progress) != info.sha256:
            raise BundleError(
                f"{path} does not match its hash in {names.MANIFEST}: it is damaged or was "
                "changed; export the bundle again"
            )


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hash of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def _inside(bundle: Path, name: str) -> Path:
    """The file `name` of the bundle; refuses whatever leaves the folder, links included."""
    pure = PurePosixPath(name)
    leaves = pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts
    path = bundle / name
    if leaves or not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(f"{bundle / names.MANIFEST} names {name!r}, which leaves the bundle")
    return path


def _parse(data: Mapping[str, Any]) -> Manifest:
    def tensors(items: list[dict[str, Any]]) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"])) for t in items
        )

    graphs = {
        precision: {
            name: GraphInfo(
                file=str(g["file"]),
                inputs=tensors(g["inputs"]),
                outputs=tensors(g["outputs"]),
                weight_bytes=g["weight_bytes"],
            )
            for name, g in by_name.items()
        }
        for precision, by_name in data["graphs"].items()
    }
    if not graphs or data["batch"] < 1:
        raise ValueError(f"{len(graphs)} precisions, batch {data['batch']}")
    model, defaults = ModelSpec.from_json(data["model"]), Sampling(**data["defaults"])
    defaults.check(model.scales)
    return Manifest(
        model=model,
        preset=data["preset"],
        batch=int(data["batch"]),
        guidance=bool(data["guidance"]),
        graphs=graphs,
        files={k: FileInfo(size=v["size"], sha256=v["sha256"]) for k, v in data["files"].items()},
        checkpoint=dict(data["checkpoint"]),
        tools=dict(data["tools"]),
        defaults=defaults,
        labels=tuple(data["labels"]),
        parity=data["parity"],
        more_smooth=bool(data.get("more_smooth", False)),
        schema_version=data["schema_version"],
    )
