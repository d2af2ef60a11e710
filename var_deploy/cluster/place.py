"""A bundle on every node that draws from it, brought there once.

Where the bundle lies at the same path with the same contents, as on one machine or in a shared
folder, it is used as it is. Other nodes fetch a copy through Ray's object store, in parts, into
$XDG_CACHE_HOME/var-deploy (~/.cache/var-deploy), where the next run finds it. Engines are no part
of it: they belong to one device, and are used where the bundle itself is.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import filelock
import ray
from ray.exceptions import RayTaskError
from ray.util.client import ray as client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from var_deploy import __version__, names
from var_deploy.errors import BundleError, VarDeployError
from var_deploy.manifest import check_files, read_manifest

PART = 1 << 24  # bytes that travel at a time


@dataclass(frozen=True, kw_only=True)
class BundleSource:
    """A bundle for all nodes of a cluster. Made by `offer`; plain data that travels to workers.

    Attributes:
        bundle: where it lies, at the offering node and perhaps at others.
        digest: of its manifest.
        precision: whose files are needed; "auto" for all.
        version: of the var-deploy that offers it.
        node: Ray's name of the node that reads it for others.
        parts: file → its parts in the object store, where the driver is on none of the nodes.
    """

    bundle: Path
    digest: str
    precision: str
    version: str
    node: str
    parts: Mapping[str, list[Any]] = field(default_factory=dict)

    def path(self) -> Path:
        """The bundle on the node of the caller, a worker; fetched where it is not there.

        One process of a node fetches while others wait. A copy is there whole or not at all, and
        one that does not match its hashes is fetched again.

        Raises VarDeployError for a worker with another version, where the disk refuses, or where
        the bundle arrives damaged (BundleError).
        """
        if __version__ != self.version:
            raise VarDeployError(
                f"node {socket.gethostname()} has var-deploy {__version__}, expected "
                f"{self.version}: install the same version on every node"
            )
        if self._holds(self.bundle, hashes=False):  # who loads it reads the hashes
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
        """Of the files that are needed."""
        return "" if self.precision == "auto" else f"{self.precision}/"

    def _holds(self, folder: Path, *, hashes: bool) -> bool:
        try:
            manifest = read_manifest(folder)
            if manifest.digest() != self.digest:
                return False
            check_files(folder, manifest, prefix=self.prefix, hashes=hashes)
        except BundleError:
            return False
        return True

    def _fetch(self, copy: Path) -> None:
        part = copy.with_name(f"{copy.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            self._write(part, names.MANIFEST)
            manifest = read_manifest(part)
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


def bundle_source(bundle: Path, precision: str = "auto") -> BundleSource:
    """BundleSource a bundle to the nodes of the cluster that this process is connected to.

    Nothing travels before a node asks for it, except from a driver outside of the cluster, which
    cannot be asked: it hands over the files at once.

    Raises BundleError for a bundle that lacks files.
    """
    bundle = bundle.resolve()
    manifest = read_manifest(bundle)
    source = BundleSource(
        bundle=bundle,
        digest=manifest.digest(),
        precision=precision,
        version=__version__,
        node=ray.get_runtime_context().get_node_id(),
    )
    check_files(bundle, manifest, prefix=source.prefix, hashes=False)
    if not cast(Any, client).is_connected():
        return source
    parts = {}
    for name in (names.MANIFEST, *needed(manifest.files, source.prefix)):
        read = functools.partial(read_part, bundle / name)
        parts[name] = [ray.put(data) for data in _in_parts(read)]
    return dataclasses.replace(source, parts=parts)


def needed(files: Mapping[str, object], prefix: str) -> list[str]:
    return sorted(name for name in files if name.startswith(prefix))


def cache_folder() -> Path:
    """Of this node, for copies of bundles."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "var-deploy"


def read_part(path: Path, offset: int) -> bytes:
    """The next part of a file, b"" at its end. Raises BundleError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(PART)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None


def cause_of(error: RayTaskError) -> BaseException:
    """What a worker raised, without the worker's traceback in its words."""
    return cast(BaseException, error.cause)


def _in_parts(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What `read` gives from one offset to the next, until it gives nothing."""
    offset = 0
    while data := read(offset):
        yield data
        offset += len(data)
