"""Copies a bundle, and its text encoder, to the nodes of a Ray cluster, once per node.

A node that has the bundle at the same path with the same contents uses it in place, as on one
machine or with a shared folder. Other nodes fetch a copy through Ray's object store, in parts, into
$XDG_CACHE_HOME/var-deploy (~/.cache/var-deploy), where the next run finds it. Engines are not
copied, since they belong to one device: they are used only where the bundle is used in place.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import filelock
import ray
from ray.exceptions import RayTaskError
from ray.util.client import ray as client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from var_deploy import __version__, names
from var_deploy.config import RuntimeConfig
from var_deploy.errors import BundleError, VarDeployError
from var_deploy.files.cache import cache_folder
from var_deploy.manifest import ListedFiles, Manifest, check_files, read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.text_features import (
    checked_text_encoder,
    own_precision,
    text_encoder_folder,
)
from var_deploy.text.manifest import TextEncoderManifest, read_text_encoder

PART = 1 << 24  # bytes per part of a file


@dataclass(frozen=True, kw_only=True)
class FolderSource(ABC):
    """Tells the nodes of a cluster where to get a folder that has a manifest; plain data.

    Attributes:
        bundle: path of the folder on the driver's node, and perhaps on others.
        digest: digest of its manifest.
        precision: the precision whose files are needed; "auto" for all.
        version: version of var-deploy on the driver.
        node: Ray's id of the node that reads the bundle for others.
        parts: file → its parts in the object store, where the driver is not a node itself.
    """

    bundle: Path
    digest: str
    precision: str
    version: str
    node: str
    parts: Mapping[str, list[Any]] = field(default_factory=dict)

    def path(self) -> Path:
        """Path of the folder on the calling worker's node, where it is fetched if it is missing.

        One process per node fetches while the others wait. A copy appears only when it is complete,
        and a copy that does not match its hashes is fetched again.

        Raises VarDeployError where the worker has another version of var-deploy or the disk cannot
        be written, BundleError where the copy is damaged.
        """
        if __version__ != self.version:
            raise VarDeployError(
                f"node {socket.gethostname()} has var-deploy {__version__}, expected "
                f"{self.version}: install the same version on every node"
            )
        if self._holds(self.bundle, hashes=False):  # hashes are checked when it is loaded
            return self.bundle
        kind = "" if self.precision == "auto" else f"-{self.precision}"
        copy = cache_folder() / f"{self.digest[:16]}{kind}"
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{copy}.lock"):
                if not self._holds(copy, hashes=True):
                    self._fetch(copy)
        except OSError as error:
            raise VarDeployError(
                f"{error.filename or copy} on node {socket.gethostname()} cannot be written: "
                f"{error.strerror or error}; make room there, or name another place in "
                "XDG_CACHE_HOME before Ray starts"
            ) from None
        return copy

    @property
    def prefix(self) -> str:
        """Prefix of the names of the needed files."""
        return "" if self.precision == "auto" else f"{self.precision}/"

    @abstractmethod
    def read(self, folder: Path) -> ListedFiles:
        """Read the manifest in a folder. Raises BundleError."""

    def _holds(self, folder: Path, *, hashes: bool) -> bool:
        try:
            manifest = self.read(folder)
            if manifest.digest() != self.digest:
                return False
            check_files(folder, manifest, prefix=self.prefix, hashes=hashes)
        except BundleError:
            return False
        return True

    def _fetch(self, copy: Path) -> None:
        part = copy.with_name(f"{copy.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        part.mkdir()
        try:
            self._write(part, names.MANIFEST)
            manifest = self.read(part)
            for name in needed(manifest.files, self.prefix):
                self._write(part, name)
            check_files(part, manifest, prefix=self.prefix)
            if manifest.digest() != self.digest:
                raise BundleError(f"{self.bundle} was exported again meanwhile; start again")
            shutil.rmtree(copy, ignore_errors=True)
            part.rename(copy)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _write(self, folder: Path, name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for data in self._parts_of(name):
                stream.write(data)

    def _parts_of(self, name: str) -> Iterator[bytes]:
        if self.parts:
            for part in self.parts[name]:
                yield ray.get(part)
            return
        there = NodeAffinitySchedulingStrategy(self.node, soft=False)
        read = cast(Any, ray.remote)(num_cpus=0, scheduling_strategy=there)(read_part)
        try:
            yield from _in_parts(lambda offset: ray.get(read.remote(self.bundle / name, offset)))
        except RayTaskError as error:
            raise cause_of(error) from None


@dataclass(frozen=True, kw_only=True)
class TextEncoderSource(FolderSource):
    """Tells the nodes of a cluster where to get a text encoder, which is a bundle of its own."""

    def read(self, folder: Path) -> ListedFiles:
        return read_text_encoder(folder)


@dataclass(frozen=True, kw_only=True)
class BundleSource(FolderSource):
    """Tells the nodes of a cluster where to get a bundle. Made by `bundle_source`.

    Attributes:
        text_encoder: where to get the text encoder of a bundle that takes prompts.
    """

    text_encoder: TextEncoderSource | None = None

    def read(self, folder: Path) -> ListedFiles:
        return read_manifest(folder)

    def open(
        self, config: RuntimeConfig, cores: int, text_config: RuntimeConfig | None = None
    ) -> Pipeline:
        """Load the bundle and its text encoder on the calling worker's node.

        Arguments are those of `Pipeline.open`. Raises what `path` and `Pipeline.open` raise.
        """
        return Pipeline.open(
            self.path(),
            config,
            digest=self.digest,
            cores=cores,
            text_encoder=self.text_encoder.path() if self.text_encoder else None,
            text_config=text_config,
        )


def bundle_source(
    bundle: Path,
    precision: str = "auto",
    *,
    text_encoder: Path | None = None,
    text_config: RuntimeConfig | None = None,
) -> BundleSource:
    """Describe a bundle for the nodes of the connected cluster, which can then fetch it.

    A node fetches files on demand from the driver's node. A driver outside the cluster cannot be
    reached by nodes, so it puts all files into the object store at once.

    Args:
        text_encoder: folder of the text encoder of a bundle that takes prompts; None looks in the
            bundle and beside it.
        text_config: how the text encoder is run; None: in `precision`, where it has that.

    Raises BundleError for a bundle or a text encoder that lacks files, and what
    `checked_text_encoder` raises.
    """
    manifest = read_manifest(bundle)
    text: TextEncoderSource | None = None
    if manifest.takes_text:
        place, found = checked_text_encoder(bundle, manifest, text_encoder)
        wanted = text_config or RuntimeConfig(precision=precision)
        text = _source(TextEncoderSource, place, found, own_precision(found, wanted))
    source = _source(BundleSource, bundle, manifest, precision)
    return dataclasses.replace(source, text_encoder=text)


def text_encoder_of(
    bundle: Path, manifest: Manifest, given: Path | None = None
) -> TextEncoderManifest | None:
    """The manifest of a bundle's text encoder, None where the bundle takes no prompts.

    Raises UsageError for a text encoder that is given to such a bundle, and what
    `checked_text_encoder` raises.
    """
    if manifest.takes_text:
        return checked_text_encoder(bundle, manifest, given)[1]
    text_encoder_folder(bundle, manifest, given)
    return None


Source = TypeVar("Source", bound=FolderSource)


def _source(kind: type[Source], folder: Path, manifest: ListedFiles, precision: str) -> Source:
    """The source of a bundle or a text encoder, with its files where nodes cannot reach them."""
    folder = folder.resolve()
    source = kind(
        bundle=folder,
        digest=manifest.digest(),
        precision=precision,
        version=__version__,
        node=ray.get_runtime_context().get_node_id(),
    )
    check_files(folder, manifest, prefix=source.prefix, hashes=False)
    if not cast(Any, client).is_connected():
        return source
    parts = {}
    for name in (names.MANIFEST, *needed(manifest.files, source.prefix)):
        read = functools.partial(read_part, folder / name)
        parts[name] = [ray.put(data) for data in _in_parts(read)]
    return dataclasses.replace(source, parts=parts)


def needed(files: Mapping[str, object], prefix: str) -> list[str]:
    """Names of the files that start with `prefix`, and of those in no folder, sorted."""
    return sorted(name for name in files if name.startswith(prefix) or "/" not in name)


def read_part(path: Path, offset: int) -> bytes:
    """Read the part of a file at `offset`, b"" at its end. Raises BundleError on failure."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(PART)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None


def cause_of(error: RayTaskError) -> BaseException:
    """The exception that a worker raised, without the worker's traceback in its message."""
    return cast(BaseException, error.cause)


def _in_parts(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Iterate over the parts of a file: `read(offset)` until it returns b""."""
    offset = 0
    while data := read(offset):
        yield data
        offset += len(data)
