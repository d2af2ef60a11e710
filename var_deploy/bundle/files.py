"""Opens the files of one precision of a bundle, all from the same export.

A bundle may be replaced or changed while a process uses it. Files are therefore read, hashed and
used through the same descriptors: the bytes of a graph that were hashed are those that become a
session, and the weights are mapped from the very file that was hashed, whatever file has its path
by then. Where a system has no path to a descriptor, files are compared once more after an inference
library has opened them by path.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from var_deploy import names
from var_deploy.bundle.graph_refs import GraphRef
from var_deploy.bundle.hash_record import HashRecord
from var_deploy.bundle.interfaces import Tensor
from var_deploy.bundle.json_values import shown
from var_deploy.bundle.onnx_file import MAX_BYTES, inspect_onnx, relocate
from var_deploy.errors import BundleChangedError, BundleError
from var_deploy.files.held_files import HeldFile
from var_deploy.manifest import (
    ListedFiles,
    Manifest,
    TensorInfo,
    check_hash,
    hold_file,
    read_manifest,
)

DESCRIPTORS = "/proc/self/fd"


class ManifestReader(Protocol):
    """Reads the manifest in a folder, whose descriptor may be given; see `read_manifest`."""

    def __call__(self, bundle: Path, *, folder: int | None = None) -> ListedFiles: ...


@dataclass(frozen=True)
class GraphFile:
    """A graph that an inference library is about to open.

    Attributes:
        path: of the ONNX file.
        ref: which graph it is.
        files: the bundle files that it belongs to, None for a graph outside of a bundle whose
            weights lie within the ONNX file.
    """

    path: Path
    ref: GraphRef
    files: BundleFiles | None = None

    @classmethod
    def outside(cls, path: Path) -> GraphFile:
        """Return a graph that does not belong to a bundle; messages call it by its file."""
        return cls(path, GraphRef(name=path.stem, kind="other"))

    def read(self) -> bytes:
        """Return the checked bytes. Raises BundleError where the graph cannot be trusted."""
        if self.files is not None:
            return self.files.read(self.ref.name)
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def key(self) -> Hashable:
        """Return a key that is equal for graphs that may share a session: equal bytes and
        weights."""
        return object() if self.files is None else self.files.key(self.ref.name)


class BundleFiles:
    """Opens the files of a bundle, and keeps them open until `close`.

    Args:
        hashes: read every file once and compare its hash; without, sizes are compared. Either way
            all files lie in the folder that holds this very manifest.
        read: reads the manifest of this kind of bundle again, as `read_manifest` does.
        record: hashes of large files that need not be computed again; None computes all. Graphs
            are always read and hashed.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: ListedFiles,
        precision: str,
        *,
        hashes: bool = True,
        record: HashRecord | None = None,
        read: ManifestReader = read_manifest,
    ) -> None:
        self._bundle, self._manifest, self._precision = bundle, manifest, precision
        self._hashes, self._record, self._read_manifest = hashes, record, read
        self._weights: HeldFile | None = None
        self._others: list[tuple[str, HeldFile]] = []
        self._checking: Future[None] | None = None
        self._stopped = threading.Event()
        self._graphs: dict[str, bytes] = {}
        self._digests: dict[str, str] = {}
        self._loaded = False
        self._lock = threading.Lock()

    @property
    def takes_text(self) -> bool:
        """Whether the bundle makes images of prompts."""
        return isinstance(self._manifest, Manifest) and self._manifest.takes_text

    def check(self, progress: Callable[[int], None] | None = None) -> None:
        """Open and check every file of the precision, which is done when this returns. Raises
        BundleError naming the first that fails."""
        self._open(progress)
        self._check_hashes(progress)

    def begin_check(
        self, then: Callable[[BundleFiles], None] | None = None, *, beside: bool = True
    ) -> None:
        """Open every file of the precision, check the graphs, and hash the large files.

        `beside` does the latter in a thread, so that graphs can be opened meanwhile: `verified`
        waits for the result, which is BundleChangedError where so much as a hard link was made in
        between. Without, it is done when this returns. `then` is called once the hashes were
        compared. Raises BundleError.
        """
        self._open(None)
        if not self._hashes:
            return
        weights = self._hold_weights()
        # from here on, every write changes the identity: what a session reads before the hash is
        # compared is what is hashed, or the comparison fails
        opened = weights.identity = weights.settled()

        def check() -> None:
            self._check_hashes(None)
            if beside and weights.identity != opened:
                raise self._changed()
            if then is not None:
                then(self)
            if self._record is not None:
                self._record.save()

        if not beside:
            check()
            return
        threads = ThreadPoolExecutor(1, thread_name_prefix="var-deploy-hashes")
        self._checking = threads.submit(check)
        threads.shutdown(wait=False)

    def verified(self) -> None:
        """Wait until what `begin_check` began is done; no graph may run before.

        Raises BundleError for the first file that fails, each time it is called.
        """
        if self._checking is not None:
            self._checking.result()

    def has_fact(self, fact: str) -> bool:
        """Whether `add_fact` was called with a fact about this very content, also by an earlier
        process where there is a record."""
        return self._record is not None and self._record.has_fact(self._fact(fact))

    def add_fact(self, fact: str) -> None:
        """Let the record remember a fact about the content of this precision's files."""
        if self._record is not None:
            self._record.add_fact(self._fact(fact))

    def graph(self, name: str) -> GraphFile:
        """Return a graph to open; nothing is read yet. Raises BundleError where the bundle lacks
        it."""
        file = self._manifest.graph(self._precision, name).file
        ref = self._manifest.graph_ref(self._precision, name)
        return GraphFile(self._bundle / file, ref, self)

    def checked(self) -> tuple[HeldFile, Collection[bytes]]:
        """Return the bytes of every graph and of the weights, between `check` and `loaded`."""
        with self._lock:
            return self._hold_weights(), tuple(self._graphs.values())

    def loaded(self, later: Collection[str]) -> None:
        """Drop the bytes of all graphs but those in `later`: the others have been opened."""
        self._loaded = True
        self._graphs = {name: data for name, data in self._graphs.items() if name in later}

    def read(self, name: str) -> bytes:
        """Return the bytes of a graph after all checks; its weights stay open.

        Raises BundleError where the graph is not what the manifest lists, or not what var-deploy
        writes, and BundleChangedError where the bundle has been replaced or changed.
        """
        with self._lock:
            info = self._manifest.graph(self._precision, name)
            weights = self._hold_weights()
            if self._loaded or name in self._graphs:
                self._check_unchanged()
            if not weights.at_path():
                raise self._changed()
            if name not in self._graphs:
                self._graphs[name] = self._read(info.file)
            data = self._graphs[name]
        if name in self._digests:
            return data
        try:
            found = inspect_onnx(data, weights.size)
            _compare("input", info.inputs, found.inputs)
            _compare("output", info.outputs, found.outputs)
        except BundleError as error:
            raise BundleError(
                f"{self._bundle / info.file} is not a graph of a bundle: {error}; export the "
                "bundle again"
            ) from None
        self._digests[name] = hashlib.sha256(data).hexdigest()
        return data

    def by_descriptor(self, data: bytes) -> tuple[bytes, str] | None:
        """Return an ONNX file whose weights are named by a descriptor's path instead of
        weights.bin.

        Returns the bytes and the folder that this path is relative to; None where the system has no
        such paths.
        """
        with self._lock:
            return by_descriptor(data, self._hold_weights())

    def key(self, name: str) -> Hashable:
        """Return the key of a graph, see `GraphFile.key`; to be called after `read`."""
        with self._lock:
            return (self._digests[name], self._hold_weights().identity)

    def confirm(self, name: str) -> None:
        """Raise BundleChangedError where the paths of a graph and its weights no longer lead to the
        files that `read` has checked.

        For a library that has opened them by path.
        """
        with self._lock:
            file = self._manifest.graph(self._precision, name).file
            try:
                again = self._hold(file)
                same = again.read() == self._graphs.get(name)
                again.close()
            except BundleError:
                same = False
            if not same or not self._hold_weights().at_path():
                raise self._changed()
            self._check_unchanged()

    def check_unchanged(self) -> None:
        """Raise BundleChangedError where the mapped weights were written to since the load.

        Takes microseconds; where only the file's times have changed, its content is hashed again.
        """
        with self._lock:
            self._check_unchanged()

    def replaced(self) -> bool:
        """Whether another bundle is at this path now than the one whose manifest was read."""
        with self._lock:
            if self._weights is not None and not self._weights.at_path():
                return True
        try:
            return self._read_manifest(self._bundle).digest() != self._manifest.digest()
        except BundleError:
            return True

    def close(self) -> None:
        """Close all files; may be called twice."""
        self._stopped.set()
        if self._checking is not None:
            self._checking.exception()  # waits: the thread reads from these files
        with self._lock:
            self._graphs.clear()
            while self._others:
                self._others.pop()[1].close()
            if self._weights is not None:
                self._weights.close()
                self._weights = None

    def _open(self, progress: Callable[[int], None] | None) -> None:
        """Open every file of the precision, and hash the graphs."""
        if self._precision not in self._manifest.graphs:
            self._manifest.graph(self._precision, names.DECODER)  # says what there is
        # files opened by path could be those of a bundle that was here only for a moment: their
        # hashes would differ, and the message would say damage
        folder = _open_folder(self._bundle)
        try:
            if folder is not None and self._digest_in(folder) != self._manifest.digest():
                raise self._changed()
            self._weights = self._hold(self._weights_name, folder)
            graphs = self._manifest.graphs[self._precision]
            try:
                for name, graph in graphs.items():
                    self._graphs[name] = self._read(graph.file, progress, folder)
                known = (self._weights_name, *(graph.file for graph in graphs.values()))
                for file in sorted(self._manifest.files):  # that no graph refers to as well
                    if file.startswith(f"{self._precision}/") and file not in known:
                        self._others.append((file, self._hold(file, folder)))
            except BundleError:
                self._check_hashes(progress)  # the weights go first: theirs is the error to raise
                raise
        finally:
            if folder is not None:
                os.close(folder)

    def _check_hashes(self, progress: Callable[[int], None] | None) -> None:
        """Compare the hashes of the files that are open."""
        if not self._hashes:
            return

        def note(size: int) -> None:
            if self._stopped.is_set():
                raise BundleError(f"the bundle at {self._bundle} was closed while it was read")
            if progress:
                progress(size)

        for name, file in ((self._weights_name, self._hold_weights()), *self._others):
            check_hash(file, self._manifest.files[name], note, self._record)

    def _fact(self, fact: str) -> str:
        """The SHA-256 that stands for a fact about the files of this precision."""
        content = [(n, f.sha256) for n, f in sorted(self._manifest.files.items())]
        return hashlib.sha256(json.dumps([fact, self._precision, content]).encode()).hexdigest()

    @property
    def _weights_name(self) -> str:
        return f"{self._precision}/{names.WEIGHTS}"

    def _hold_weights(self) -> HeldFile:
        if self._weights is None:
            self._weights = self._hold(self._weights_name, hashes=self._hashes)
        return self._weights

    def _hold(self, name: str, folder: int | None = None, *, hashes: bool = False) -> HeldFile:
        return hold_file(self._bundle, self._manifest, name, hashes=hashes, folder=folder)

    def _read(
        self,
        name: str,
        progress: Callable[[int], None] | None = None,
        folder: int | None = None,
    ) -> bytes:
        """Return the bytes of the ONNX file `name`, which were hashed."""
        info = self._manifest.files[name]
        if info.size > MAX_BYTES:
            raise BundleError(
                f"{self._bundle / name} has {info.size} bytes, at most {MAX_BYTES} are expected of "
                "a graph; export the bundle again"
            )
        file = self._hold(name, folder)
        try:
            data = file.read()
            intact = len(data) == info.size
            if intact and self._hashes:
                intact = hashlib.sha256(data).hexdigest() == info.sha256
                if not intact:
                    check_hash(file, info)  # says what is wrong
        except OSError as error:
            words = error.strerror or error
            raise BundleError(f"{file.path} cannot be read ({words}); load it again") from None
        finally:
            file.close()
        if not intact:
            raise self._changed()
        if progress:
            progress(len(data))
        return data

    def _check_unchanged(self) -> None:
        weights = self._weights
        if weights is None or weights.now() == weights.identity:
            return
        # a link made or a name removed changes the times as well, but not the content
        expected = self._manifest.files[self._weights_name].sha256
        found = weights.sha256()
        if not self._loaded and (found is None or found[0] != expected):
            raise self._changed()
        if found is None or found[0] != expected:
            raise BundleChangedError(
                f"{weights.path} was overwritten since the bundle was loaded; load it again"
            )
        weights.identity = found[1]

    def _digest_in(self, folder: int) -> str:
        return self._read_manifest(self._bundle, folder=folder).digest()

    def _changed(self) -> BundleChangedError:
        if self._loaded:
            return BundleChangedError(
                f"the bundle at {self._bundle} was replaced since it was loaded; load it again"
            )
        return BundleChangedError(f"the bundle at {self._bundle} changed while it was read")


def _compare(kind: str, listed: Sequence[TensorInfo], declared: Sequence[Tensor]) -> None:
    """Raise BundleError where a graph's inputs or outputs are not those that the manifest lists."""
    found = {tensor[0]: tensor for tensor in declared}
    for tensor in listed:
        if tensor.name not in found:
            raise BundleError(f"{kind} {tensor.name} is missing")
        if found.pop(tensor.name) != (tensor.name, tensor.dtype, tensor.shape):
            raise BundleError(
                f"{kind} {tensor.name} has another type or shape than {names.MANIFEST} says"
            )
    if found or len(declared) != len(listed):
        extra = next(iter(found), "that is there twice")
        raise BundleError(f"{kind} {shown(extra)} is not in {names.MANIFEST}")


def by_descriptor(data: bytes, weights: HeldFile) -> tuple[bytes, str] | None:
    """An ONNX file whose weights are named by the path of a descriptor instead of weights.bin, and
    the folder that this path is relative to; None where the system has no such paths."""
    place = f"{DESCRIPTORS}/{weights.descriptor}"
    if not os.path.exists(place):
        return None
    return relocate(data, place.lstrip("/")), "/"


def _open_folder(bundle: Path) -> int | None:
    """Open the folder, through whose descriptor all files are of one export.

    Returns None where the system has no such descriptors. Raises BundleError.
    """
    if os.open not in os.supports_dir_fd:
        return None
    try:
        return os.open(bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"{bundle} cannot be read ({error.strerror}); load it again") from None
