"""Files that are checked and used through one descriptor, so that both see the same file.

A path may lead to another file from one moment to the next; a descriptor does not. The content may
still be overwritten in place, and that shows in the file's times.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from var_deploy.bundle.hash_record import HashRecord

CHUNK = 1 << 22
# Two changes within one tick of a file system's clock leave the same time. The clocks of today's
# tick every few milliseconds; where a time has no fraction of a second they may tick every two.
FINE_TICK, COARSE_TICK = 0.05, 2.0
TRIES = 3  # how often a file is read that changes meanwhile
REMEMBERED = 4096  # hashes of files, so that a process reads no file twice without need

# device, inode, size, time of the last write, time of the last change of any kind
Identity = tuple[int, int, int, int, int]

_hashes: dict[Identity, str] = {}


def discard_hashes() -> None:
    """Discard the hashes that this process remembers, as if it had just been started."""
    _hashes.clear()


def open_regular(path: Path | str, folder: int | None = None) -> int:
    """Open a regular file for reading and return its descriptor; never waits for a FIFO.

    Raises OSError, also for a path that is not a regular file, or is not valid.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOCTTY"):
        flags |= getattr(os, name, 0)
    try:
        file = os.open(path, flags, dir_fd=folder)
    except ValueError as error:  # a NUL in the path, or what cannot be encoded
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def identity_of(found: os.stat_result) -> Identity:
    """Return a file's identity: equal while it is the same file and was not written to."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class HeldFile:
    """A regular file that is open for reading, until `close` or garbage collection.

    Attributes:
        path: where it was found.
        identity: when it was opened; set again by the code that checks the content.
    """

    def __init__(self, path: Path, name: str | None = None, folder: int | None = None) -> None:
        """Open `name` in the folder behind the descriptor `folder`, or else `path`.

        Raises OSError.
        """
        self.path = path
        self._file = open_regular(path if folder is None else name or path, folder)
        self._closed = weakref.finalize(self, os.close, self._file)
        self._reading = threading.Lock()  # the position in the file is one for all threads
        self.identity = self.now()

    @property
    def descriptor(self) -> int:
        return self._file

    @property
    def size(self) -> int:
        return self.identity[2]

    def now(self) -> Identity:
        return identity_of(os.fstat(self._file))

    def at_path(self) -> bool:
        """Whether `path` still leads to this very file."""
        try:
            found = os.stat(self.path)
        except (OSError, ValueError):
            return False
        return (found.st_dev, found.st_ino) == self.identity[:2]

    def read(self) -> bytes:
        """Return all bytes; fewer or more than `size` where the file changes meanwhile."""
        pieces = list[bytes]()
        with self._reading:
            os.lseek(self._file, 0, os.SEEK_SET)
            while piece := os.read(self._file, CHUNK):
                pieces.append(piece)
        return b"".join(pieces)

    def sha256(
        self,
        progress: Callable[[int], None] | None = None,
        record: HashRecord | None = None,
    ) -> tuple[str, Identity] | None:
        """Return the hash of the content and its identity, None where the file keeps changing.

        A file that changes while it is read is read again: its times change with its content, but
        also where another program makes a hard link to it or removes one. A hash that this process
        knows is not computed again, nor one of the record, which learns those that are computed.
        `progress` is called with bytes read.
        """
        for attempt in range(TRIES):
            found = self._sha256(None if attempt else progress, record)
            if found is not None:
                return found
        return None

    def _sha256(
        self, progress: Callable[[int], None] | None, record: HashRecord | None
    ) -> tuple[str, Identity] | None:
        """Do what `sha256` does once."""
        before = self.settled()
        known = _hashes.get(before) or (record.sha256(before) if record else None)
        if known is not None:
            if progress:
                progress(self.size)
            return known, before
        digest = hashlib.sha256()
        with self._reading:
            os.lseek(self._file, 0, os.SEEK_SET)
            while piece := os.read(self._file, CHUNK):
                digest.update(piece)
                if progress:
                    progress(len(piece))
        if self.now() != before:
            return None
        if len(_hashes) >= REMEMBERED:
            _hashes.clear()
        _hashes[before] = digest.hexdigest()
        if record:
            record.add_sha256(before, _hashes[before])
        return _hashes[before], before

    def settled(self) -> Identity:
        """Return the identity, after waiting until any later write would change it."""
        found = self.now()
        coarse = found[3] % 1_000_000_000 == 0 == found[4] % 1_000_000_000
        tick = COARSE_TICK if coarse else FINE_TICK
        wait = found[4] / 1e9 + tick - time.time()
        if 0 < wait <= tick:
            time.sleep(wait)
            found = self.now()
        return found

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._closed()
