"""Writes files atomically, and never through a link that another user put there.

A file is written beside its place under a new name that cannot be guessed, flushed to the disk and
renamed. `whole_file` is the only way in which this package writes a file of a name that is known
beforehand; `var_deploy.files.folders` does the same for folders.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from var_deploy.errors import UsageError, VarDeployError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted: see `remove_dead_files`
    fcntl = None  # type: ignore[assignment]

# What file managers, file systems and servers of files leave in any folder: it does not make a
# folder "not empty", and its loss does no harm.
SCRATCH = frozenset(
    {
        *(".DS_Store", ".localized", ".Spotlight-V100", ".Trashes", ".fseventsd", "Icon\r"),
        *("Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
        *("lost+found", ".directory", "@eaDir", ".Trash-0", ".Trash-1000"),
    }
)
SCRATCH_PATTERN = re.compile(r"\._.+|\.nfs[0-9a-f]{16,}|\.fuse_hidden[0-9a-f]+")
TEMPORARY = re.compile(r"\..*\.(?:[0-9a-f]{8}){1,2}\.tmp", re.DOTALL)
NAME_SHOWN = 40  # characters of a name that a temporary one repeats: a long name has no room
LOCK_WAIT, LOCK_PAUSE = 10.0, 0.02  # seconds
MOST_BYTES = 255  # longest file name, where the system does not say


@contextlib.contextmanager
def whole_file(
    path: Path, *, error: type[VarDeployError] = VarDeployError, follow: bool = True
) -> Iterator[BinaryIO]:
    """Yield a stream whose bytes replace the file `path`, by rename, when the block ends.

    Where the block raises, the old file, if any, is still there. Parents are made. The new file
    has the permissions that the umask gives. Of several writers at once, one wins.

    Args:
        error: raised where the disk refuses.
        follow: whether a link at `path` is followed, as a user expects who names a link as an
            output. Without it the link is replaced: a link in a bundle or a set may lead to a
            file that others share, such as a blob in a cache.

    Raises UsageError where `path` is a folder or no ordinary file.
    """
    target = Path(os.path.realpath(path)) if follow else path
    with disk_errors(path, error):
        check_ordinary(target, path)
        with _temporary(target) as (temporary, stream):
            yield stream
            _finish(stream)
            temporary.replace(target)
        sync_folder(target.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write like `whole_file` a file that must not replace an existing one.

    Where a file is at `path` by the end of the block, it stays and nothing is written. Raises
    VarDeployError where the disk refuses.
    """
    with disk_errors(path):
        with _temporary(path) as (temporary, stream):
            yield stream
            _finish(stream)
            try:
                os.link(temporary, path)  # unlike a rename, it replaces nothing
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not path.exists():
                    temporary.replace(path)
        sync_folder(path.parent)


def check_ordinary(target: Path, shown: Path | None = None) -> None:
    """Raise UsageError where a file cannot replace `path`: a folder, a device, a pipe."""
    if target.exists() and not target.is_file():
        raise UsageError(f"{shown or target} is not an ordinary file; choose another output")


def check_writable(path: Path) -> None:
    """Raise UsageError, before any work is done, where a file or folder `path` could not be made.

    Missing parents are fine, they are made on saving. Nothing is left behind.
    """
    # os.path.exists, because a name that is too long makes Path.exists raise
    existing = Path(os.path.realpath(path))
    missing: list[str] = []
    while not os.path.exists(existing) and existing != existing.parent:
        missing.append(existing.name)
        existing = existing.parent
    folder = existing if missing or not existing.is_file() else existing.parent
    if not folder.is_dir():
        raise UsageError(f"{path} cannot be written: {folder} is not a folder")
    most = _longest_name(folder)
    for name in missing:
        size = len(os.fsencode(name))
        if size > most:
            raise UsageError(
                f"{path} cannot be written: a name in it has {size} bytes, the file system takes "
                f"at most {most}; choose a shorter one"
            )
    try:
        # trying is the only sure way: access bits say nothing about read-only mounts or root
        with tempfile.TemporaryFile(dir=folder):
            pass
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # the whole path may be too long as well
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None


def is_scratch(name: str) -> bool:
    """Whether operating systems leave a file or folder of this name in any folder."""
    return name in SCRATCH or SCRATCH_PATTERN.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """Whether this is a name that `whole_file` gives to files that are being written."""
    return TEMPORARY.fullmatch(name) is not None


def remove_dead_files(folder: Path) -> None:
    """Delete the temporary files of killed writers; those still being written stay."""
    for name in filter(is_temporary, os.listdir(folder)):
        path = folder / name
        # on Windows deleting fails while it is open, which is all that is asked
        with contextlib.suppress(OSError):
            if fcntl is None:
                path.unlink()
                continue
            # not through a link, and without waiting for the other end of a pipe
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path, error: type[VarDeployError] = VarDeployError) -> Iterator[None]:
    """Turn an OSError into `error`, whose message says that `path` cannot be written and why."""
    try:
        yield
    except OSError as cause:
        raise error(f"{path} cannot be written: {cause.strerror or cause}") from cause


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; other processes wait for it, for ten seconds at most.

    The lock is of the folder that is at `folder` when it is granted: one that was replaced
    meanwhile is locked anew. Does nothing where the folder is missing or the file system has no
    locks. Each file is written atomically without the lock as well; the lock keeps several files
    together.
    """
    handle = _lock(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def lock_file(stream: IO[Any]) -> bool | None:
    """Lock an open file until it is closed or the process ends, whatever ends it.

    False where another process has the lock, None where the system or file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync(stream: IO[Any]) -> None:
    """Flush a file to the disk, so that a power loss cannot keep its name without its bytes.

    Raises OSError, except where the file system has no such operation.
    """
    try:
        os.fsync(stream.fileno())
    except OSError as error:
        # EBADF: Windows, of a file that was opened for reading
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF):
            raise


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new file beside `target`, open, locked, with a name that cannot be guessed.

    It is deleted at the end of the block unless it was renamed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        name = f".{target.name[:NAME_SHOWN]}.{secrets.token_hex(8)}.tmp"
        temporary = target.with_name(name)
        try:
            # exclusive, so no link is followed; and it takes the usual permissions, which one
            # from `tempfile` would not
            with cast(BinaryIO, temporary.open("xb")) as stream:
                # before it was locked, `remove_dead_files` may have taken it for a dead one
                if lock_file(stream) is not False and temporary.exists():
                    yield temporary, stream
                    return
        finally:
            with contextlib.suppress(OSError):  # the block has raised an error
                temporary.unlink(missing_ok=True)


def _finish(stream: BinaryIO) -> None:
    """Flush the file to the disk and close it; Windows renames closed files only."""
    stream.flush()
    sync(stream)
    stream.close()


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    end = time.monotonic() + LOCK_WAIT
    while time.monotonic() < end:
        handle = None
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
            os.close(handle)
        except BlockingIOError:
            os.close(cast(int, handle))
            time.sleep(LOCK_PAUSE)
        except OSError:
            if handle is not None:
                os.close(handle)
            return None
    return None


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has no such question
        return MOST_BYTES
