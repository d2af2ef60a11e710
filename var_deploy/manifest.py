"""manifest.json: the contents of a bundle, and the checks before anything is loaded.

A bundle may come from an untrusted source. Reading validates the whole manifest against stated
bounds (`var_deploy.bundle.manifest_format`), and refuses a bundle from a newer schema and a file
that is missing or has another size or hash. Each refusal is one line that says what to do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from var_deploy import names
from var_deploy.bundle.graph_refs import GraphRef, graph_ref
from var_deploy.bundle.json_values import DamagedError, Value, read_json, shown
from var_deploy.errors import BundleChangedError, BundleError, UsageError, one_line
from var_deploy.files import whole_file
from var_deploy.files.held_files import HeldFile
from var_deploy.sampling import BitSampling, Sampling
from var_deploy.spec import ModelSpec, TextModelSpec

if TYPE_CHECKING:
    from var_deploy.bundle.hash_record import HashRecord

# Version 2 may hold `more_smooth`, whose graphs take an input that a reader of version 1 does not
# know. Bundles without it are still written as version 1, byte for byte as before.
# Version 3 is a text-to-image model. Version 4 has `batches`.
SCHEMA_VERSION = 4
TEXT_VERSION = 3
SMOOTH_VERSION = 2
PLAIN_VERSION = 1
MANIFEST_BYTES = 16 << 20  # a released model's manifest has a quarter of a MiB
HASH_CHUNK = 1 << 22
LONGEST_COMPLAINT = 300  # characters: a value from the file may be in it


class LeavesError(Exception):
    """A path in a manifest leads out of the bundle."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Name, NumPy dtype and shape of a graph's input or output; a string is a symbolic size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphInfo:
    """The manifest's entry of one ONNX file; `file` is relative to the bundle, with forward
    slashes."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weight_bytes: int  # bytes of weights.bin that this graph uses

    def input(self, name: str) -> TensorInfo:
        return next(t for t in self.inputs if t.name == name)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size and hash of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TextEncoderRef:
    """The text encoder that a text-to-image bundle takes its features from.

    Attributes:
        digest: of the text encoder's bundle, which several image bundles may share.
        folder: name of its folder, in this bundle or beside it.
    """

    digest: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
        model: sizes of the model.
        preset: name of the preset, "" for a model without one.
        batch: B, images per launch.
        batches: images per launch of a precision whose graphs do not take `batch`; see `of`.
        guidance: whether the graphs run 2B rows.
        more_smooth: whether the scale graphs mix codes, see `sampling.smoothing`.
        graphs: precision → graph name → graph.
        files: path in the bundle → size and hash, for every file but the manifest.
        checkpoint: where the weights came from (names and hashes, no machine paths).
        tools: versions of what wrote the bundle.
        defaults: sampling settings used where a call gives none.
        labels: class names, index = label; empty where they are not known.
        parity: the last `verify` report, None before the first.
        text_encoder: the text encoder whose features a text-to-image model was made for.
    """

    model: ModelSpec | TextModelSpec
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
    text_encoder: TextEncoderRef | None = None
    more_smooth: bool = False
    batches: Mapping[str, int] = field(default_factory=dict)
    schema_version: int = field(default=PLAIN_VERSION)

    def __post_init__(self) -> None:
        if self.batches:
            object.__setattr__(self, "schema_version", SCHEMA_VERSION)
        elif isinstance(self.model, TextModelSpec):
            object.__setattr__(self, "schema_version", TEXT_VERSION)
        elif self.more_smooth:
            object.__setattr__(self, "schema_version", SMOOTH_VERSION)

    @property
    def rows(self) -> int:
        """G, the number of rows: 2B with guidance, else B."""
        return 2 * self.batch if self.guidance else self.batch

    def of(self, precision: str) -> Manifest:
        """Return this manifest with the `batch` of the graphs of one precision.

        It is for running them; only the whole manifest is saved.
        """
        return dataclasses.replace(self, batch=self.batches.get(precision, self.batch))

    def graph(self, precision: str, name: str) -> GraphInfo:
        """Return the entry of a graph. Raises BundleError where the bundle lacks it."""
        return graph_of(self.graphs, precision, name, "the bundle")

    def graph_ref(self, precision: str, name: str) -> GraphRef:
        """Return which graph `name` is. Raises KeyError for a name that no bundle of the model
        has."""
        return graph_ref(self.model, precision, name)

    def sampling(self, base: Sampling | None = None, **changes: Any) -> Sampling:
        """Return `base`, or else the bundle's defaults, with those `changes` that are not None.

        Raises UsageError for a value that is out of range or that the bundle does not support.
        """
        base = base or self.defaults
        if isinstance(base, BitSampling) != self.takes_text:
            # settings of the other kind of model: the values that were given count
            kind = BitSampling if self.takes_text else Sampling
            base = kind(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
        sampling = base.replace(**changes)
        sampling.check(self.model.scales)
        if sampling.guides and not self.guidance and self.model.transformer.guidable:
            none = 1 if self.takes_text else 0
            raise UsageError(f"this bundle was exported with --no-guidance: cfg must be {none}")
        return sampling

    @property
    def takes_text(self) -> bool:
        """Whether the model makes images of prompts; else of class labels, or of nothing."""
        return isinstance(self.model, TextModelSpec)

    def code_model(self, what: str) -> ModelSpec:
        """Return the sizes of a model whose tokens are codes.

        Raises UsageError where the model is of another kind, which `what` does not know.
        """
        if isinstance(self.model, TextModelSpec):
            raise UsageError(f"{what} does not know text-to-image bundles yet")
        return self.model

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        data["model"] = self.model.to_json()
        if not self.more_smooth:
            del data["more_smooth"]
        if not self.batches:
            del data["batches"]
        if self.text_encoder is None:
            del data["text_encoder"]
        return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """Return a hash of what the bundle computes: any graph or weight changes it, a report does
        not."""
        return digest_of(self.files)

    def parity_is_current(self) -> bool | None:
        """Whether the stored report of `verify` was made for the files that are listed now.

        None where that is unknown: there is no report, or it is of a var-deploy that did not
        record what it was made for.
        """
        made_for = self.parity.get("digest") if isinstance(self.parity, Mapping) else None
        return made_for == self.digest() if made_for else None

    def save(self, bundle: Path) -> None:
        """Write manifest.json atomically.

        A link is replaced, not followed: in a cache it leads to a file that others share. Raises
        BundleError where the disk refuses; an older manifest is still there then.
        """
        with whole_file(bundle / names.MANIFEST, error=BundleError, follow=False) as stream:
            stream.write(self.to_json().encode())


class ListedFiles(Protocol):
    """A manifest as far as it lists graphs and files: of images, or of a text encoder."""

    @property
    def graphs(self) -> Mapping[str, Mapping[str, GraphInfo]]:
        """Precision → graph name → graph."""
        ...

    @property
    def files(self) -> Mapping[str, FileInfo]:
        """Path in the bundle → size and hash."""
        ...

    def graph(self, precision: str, name: str) -> GraphInfo:
        """Return the entry of a graph. Raises BundleError where the bundle lacks it."""
        ...

    def graph_ref(self, precision: str, name: str) -> GraphRef:
        """Return which graph `name` is."""
        ...

    def digest(self) -> str:
        """Return a hash of what the bundle computes."""
        ...


def graph_of(
    graphs: Mapping[str, Mapping[str, GraphInfo]], precision: str, name: str, what: str
) -> GraphInfo:
    """Return the entry of a graph; `what` is the bundle's title in messages. Raises BundleError."""
    if precision not in graphs:
        raise BundleError(
            f"{what} has no {precision} graphs (it has {', '.join(graphs)}); "
            f"export it again with --precision {precision}"
        )
    if name not in graphs[precision]:
        raise BundleError(f"{what} has no graph {name} in {precision}; export it again")
    return graphs[precision][name]


def digest_of(files: Mapping[str, FileInfo]) -> str:
    """Return one hash of the names and hashes of files."""
    listing = [(name, f.sha256) for name, f in sorted(files.items())]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def read_manifest(bundle: Path, *, folder: int | None = None) -> Manifest:
    """Read and check the manifest itself (not the files that it lists).

    Args:
        folder: descriptor of the bundle's folder where it is held open, else None.

    Raises BundleError where the folder is not a bundle, the manifest is damaged, from a newer
    schema, out of bounds, or names a path outside the folder.
    """
    from var_deploy.bundle.manifest_format import parse_manifest  # which needs the classes above

    path = bundle / names.MANIFEST
    data = read_manifest_json(bundle, folder=folder)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(data, dict) and "kind" in data:
        raise BundleError(
            f"{bundle} is a bundle of the kind {shown(data['kind'])}, expected one that makes "
            "images; give the folder that var-deploy export wrote"
        )
    if type(version) is not int or version < 1:
        raise BundleError(f"{path} is not a var-deploy manifest")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {shown(version)}, this var-deploy reads up to "
            f"{SCHEMA_VERSION}; upgrade var-deploy or export the bundle again"
        )
    try:
        return parse_manifest(Value(data))
    except LeavesError as error:
        raise BundleError(f"{path} {error}") from None
    except (DamagedError, UsageError) as error:
        words = str(error)[:LONGEST_COMPLAINT]
        raise BundleError(f"{path} is damaged ({words}); export the bundle again") from None


def read_manifest_json(bundle: Path, *, folder: int | None = None) -> Any:
    """Read the JSON of a manifest of bounded size; its content is not checked.

    Raises BundleError where the folder has no manifest, or none that is JSON.
    """
    path = bundle / names.MANIFEST
    try:
        data = read_json(
            path if folder is None else Path(names.MANIFEST), MANIFEST_BYTES, folder=folder
        )
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(_no_bundle(bundle, looked=folder is None)) from None
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or one_line(error)
        raise BundleError(f"{path} cannot be read ({words}); export the bundle again") from None
    return data


def _no_bundle(bundle: Path, *, looked: bool) -> str:
    """What to say of a path without a manifest; `looked` where it was not held open before."""
    if not looked or os.path.exists(bundle):
        return f"{bundle} is not a bundle: it has no {names.MANIFEST}"
    if str(bundle) in names.PRESETS:
        made = Path("build", bundle)
        return f"{bundle} is a preset: export it first (var-deploy export {bundle} --out {made})"
    return f"{bundle} does not exist; give the folder of a bundle, which var-deploy export writes"


def check_files(
    bundle: Path,
    manifest: ListedFiles,
    *,
    prefix: str = "",
    hashes: bool = True,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Check the listed files under `prefix`: present, of the right size, of the right hash.

    Files of no folder, such as a text encoder's tokenizer.json, belong to every prefix. Links are
    followed. `progress` is called with the bytes read. Raises BundleError naming the first file
    that fails.
    """
    for name in sorted(manifest.files):
        if name.startswith(prefix) or "/" not in name:
            hold_file(bundle, manifest, name, hashes=hashes, progress=progress).close()


def hold_file(
    bundle: Path,
    manifest: ListedFiles,
    name: str,
    *,
    hashes: bool = True,
    progress: Callable[[int], None] | None = None,
    folder: int | None = None,
) -> HeldFile:
    """Open a listed file and check its size and, with `hashes`, its content.

    The caller closes it. `folder` is as in `read_manifest`. Raises BundleError where the file is
    missing, is not the one that the manifest means, or changes while it is read.
    """
    path, info = bundle / name, manifest.files[name]
    try:
        file = HeldFile(path, name, folder)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path} is missing; export the bundle again") from None
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror or error}); export the bundle again"
        ) from None
    try:
        if file.size != info.size:
            raise BundleError(
                f"{path} has {file.size} bytes, expected {info.size}: it is truncated or was "
                "replaced; export the bundle again"
            )
        if hashes:
            check_hash(file, info, progress)
    except BaseException:
        file.close()
        raise
    return file


def check_hash(
    file: HeldFile,
    info: FileInfo,
    progress: Callable[[int], None] | None = None,
    record: HashRecord | None = None,
) -> None:
    """Compare the content of an open file with its hash, and set its identity to the one that was
    read. A hash of the record is taken as it is. Raises BundleError, BundleChangedError where the
    file keeps changing."""
    try:
        found = file.sha256(progress, record)
    except OSError as error:
        raise BundleError(
            f"{file.path} cannot be read ({error.strerror or error}); export the bundle again"
        ) from None
    if found is None:
        raise BundleChangedError(f"{file.path} changed while it was read; load the bundle again")
    digest, file.identity = found
    if digest != info.sha256:
        raise BundleError(
            f"{file.path} does not match its hash in {names.MANIFEST}: it is damaged or was "
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
