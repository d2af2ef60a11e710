"""Writing a folder so that it appears whole, and replacing one without losing what is not ours.

Everything is written into a work folder first, and moved when it is complete:

    .bundle.partial-1f2e…/     beside bundle/, on the same file system
      lock                     held while its process lives; the name of the folder it is for
      incomplete/              being written: nobody misses it
      complete/                whole. Before the exchange the new folder, after it the old one
      previous0/               where the system cannot exchange: the old folder, moved aside

A kill at any moment leaves the old folder or the new one at its place (between two renames, where
an exchange is not possible: neither, until the next writer puts the old one back). The next writer
of the same folder recognises what a dead one left by the lock that nobody holds, and removes it.

A folder that cannot be renamed is written from inside: one that is a mount point or holds one, the
folder that this process stands in, and one whose parent cannot be written. Its index file goes
first and comes back last, so there is no moment in which a reader finds half of each.

What the index of an old folder does not name is never deleted: it is moved into the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from var_deploy.errors import UsageError, VarDeployError
from var_deploy.files import (
    NAME_SHOWN,
    check_ordinary,
    check_writable,
    disk_errors,
    is_scratch,
    is_temporary,
    lock_file,
    locked_folder,
    remove_dead_files,
    sync,
    sync_folder,
)

LOCK, INCOMPLETE, COMPLETE, PREVIOUS = "lock", "incomplete", "complete", "previous"
OLD_INDEX, STARTED = "old-index", "started"  # of a folder that is written from inside
FOREIGN_AGE = 86_400.0  # seconds after which another machine's work folder is taken for dead
WORK_FOLDER = re.compile(r"\..*\.partial-[0-9a-f]{16}", re.DOTALL)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True, kw_only=True)
class Index:
    """The file in which a folder of some kind names its own files.

    Attributes:
        name: of the file, in the folder itself.
        listed: relative paths, with forward slashes, that the index of a folder names; [] without
            an index. Raises VarDeployError where the file is something else.
        kept: entries that belong to the folder, and outlive a replacement.
    """

    name: str
    listed: Callable[[Path], Collection[str]]
    kept: Collection[str] = ()

    def foreign(self, folder: Path) -> str | None:
        """The first path in `folder` that is neither the folder's own nor left by a system."""
        own = {self.name, *self.listed(folder)}
        for path in _walk(folder, without=self.kept):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                # one that holds files is judged by them
                if name in own or (not any(path.iterdir()) and not _leads_to(name, own)):
                    return name
            elif name not in own:
                return name
        return None


@contextlib.contextmanager
def whole_folder(
    path: Path,
    *,
    check: Callable[[], None],
    index: Index | None = None,
    error: type[VarDeployError] = VarDeployError,
) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends, whole or not at all.

    Without `index`, `path` must be new or empty by then. With it, a folder that has such an index
    is replaced: the files that the index names go, everything else moves into the new folder.
    A link at `path` is followed. Parents are made. The new folder has the permissions that the
    umask gives.

    Args:
        check: called before anything is written and again right before the folder takes its place,
            with `path` locked; raises UsageError where it holds what must not be replaced.
        error: raised where the disk refuses.
    """
    place = Path(os.path.realpath(path))
    with locked_folder(place):  # not in the middle of another writer's exchange
        check()
    with disk_errors(path, error):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path, index)
        inside = must_write_inside(place)
        with _work_folder(place, index, inside=inside) as work:
            (work / INCOMPLETE).mkdir()
            yield work / INCOMPLETE
            _sync_tree(work / INCOMPLETE)
            if index is None:
                _fill(work / INCOMPLETE, place, check)
            elif inside:
                (work / INCOMPLETE).rename(work / COMPLETE)
                _install(work, place, index, check)
            else:
                (work / INCOMPLETE).rename(work / COMPLETE)
                _exchange(work, place, check)
        sync_folder(place.parent)
        if work.exists():
            raise error(
                f"{path} was replaced; what came into the old folder meanwhile could not be moved "
                f"to the new one and lies in {work}"
            )


@contextlib.contextmanager
def filled_folder(folder: Path, file_names: Sequence[str]) -> Iterator[Path]:
    """A work folder whose files of these names move into `folder` when the block ends.

    Made if it is missing; files of other names in it stay, files of the same names are replaced.
    Raises UsageError where one of the names is a folder there, VarDeployError where the disk
    refuses.
    """
    place = Path(os.path.realpath(folder))
    with disk_errors(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place, None)
        with _work_folder(place, None, inside=place.is_dir()) as work:
            new = work / INCOMPLETE
            new.mkdir()
            yield new
            _sync_tree(new)
            if os.path.lexists(place) or not _rename_to_free(new, place):
                with locked_folder(place):
                    for name in file_names:
                        check_ordinary(place / name, folder / name)
                    for name in file_names:
                        (new / name).replace(place / name)
        sync_folder(place)


def check_folder_writable(path: Path) -> None:
    """Raise UsageError, before any work is done, where `whole_folder` could not write `path`."""
    place = Path(os.path.realpath(path))
    # os.path.isdir, because a name that is too long makes Path.is_dir raise
    if os.path.lexists(place) and not os.path.isdir(place):
        raise UsageError(f"{path} is a file; name a folder")
    if os.path.isdir(place) and not must_write_inside(place):
        check_writable(place.parent)
    else:
        check_writable(path)


def must_write_inside(place: Path) -> bool:
    """Whether a folder cannot or should not be renamed, so that it is written from inside."""
    if not os.path.isdir(place):
        return False
    try:
        # a shell that stands in the folder would be left in a deleted one
        here = Path(os.path.realpath(os.getcwd())).is_relative_to(place)
    except OSError:  # this process stands in a deleted folder itself
        here = False
    return here or _holds_mount(place) or not _writable(place.parent)


def entries_that_count(folder: Path) -> list[str]:
    """Sorted names of what somebody put into a folder: a folder without any is empty.

    Not counted is what systems leave in any folder, and what is just being written.
    """
    return sorted(
        name
        for name in os.listdir(folder)
        if not (is_scratch(name) or is_temporary(name) or WORK_FOLDER.fullmatch(name))
    )


def remove_leftovers(path: Path, index: Index | None) -> None:
    """Remove the work folders of writers of `path` that were killed, after saving what is the
    user's in them. A folder whose lock is held stays, and one that cannot be removed."""
    place = Path(os.path.realpath(path))
    for parent in (place.parent, place):
        with contextlib.suppress(OSError):
            for name in os.listdir(parent):
                if name.startswith(_prefix(place)) and WORK_FOLDER.fullmatch(name):
                    _remove_leftover(parent / name, place, index)


# the work folder


@contextlib.contextmanager
def _work_folder(place: Path, index: Index | None, *, inside: bool) -> Iterator[Path]:
    """A new work folder whose lock is held; at the end it goes with what is in it."""
    work, lock = _new_work_folder(place, place if inside else place.parent)
    try:
        yield work
    finally:
        try:
            _clear(work, place, index)
        finally:
            lock.close()


def _new_work_folder(place: Path, parent: Path) -> tuple[Path, IO[bytes]]:
    while True:
        work = parent / f"{_prefix(place)}{secrets.token_hex(8)}"
        work.mkdir()
        try:
            lock = (work / LOCK).open("xb")
        except FileNotFoundError:  # taken for a dead one before it had a lock
            continue
        lock.write(_owner(place))
        lock.flush()
        # where there are no locks, nobody gets one and takes it for dead
        if lock_file(lock) is not False and (work / LOCK).exists():
            return work, lock
        lock.close()


def _owner(place: Path) -> bytes:
    """What the lock says: which machine writes which folder."""
    return b"%b\n%b" % (os.fsencode(socket.gethostname()), os.fsencode(place.name))


def _prefix(place: Path) -> str:
    return f".{place.name[:NAME_SHOWN]}.partial-"


def _remove_leftover(work: Path, place: Path, index: Index | None) -> None:
    if work.is_symlink():
        return
    with contextlib.suppress(OSError):
        work.rmdir()  # empty: killed before it had a lock; a living writer makes another one
    with contextlib.suppress(OSError), (work / LOCK).open("r+b") as lock:
        owner = lock.read()
        if owner.partition(b"\n")[2] != os.fsencode(place.name):
            return  # of a longer name that begins alike
        # a network file system may keep the locks of each machine apart
        age = time.time() - os.fstat(lock.fileno()).st_mtime
        if (owner == _owner(place) or age > FOREIGN_AGE) and lock_file(lock) is True:
            if index is not None and (work / STARTED).exists():
                _finish_install(work, place, index)
            _clear(work, place, index)


def _clear(work: Path, place: Path, index: Index | None) -> None:
    """Remove a work folder, but nothing that was in the user's folder and is not in its index."""
    shutil.rmtree(work / INCOMPLETE, ignore_errors=True)
    complete, aside = work / COMPLETE, sorted(work.glob(f"{PREVIOUS}*"))
    if index is not None and (work / STARTED).exists() and (complete / index.name).exists():
        return  # could not be finished, and may be by the next writer
    if aside and not os.path.lexists(place):
        aside[-1].rename(place)  # cut off between two renames
    for old in (complete, *aside):
        if old.is_dir() and index is not None:
            _salvage(old, place, index)
    if set(os.listdir(work)) <= {LOCK, STARTED, OLD_INDEX}:
        shutil.rmtree(work, ignore_errors=True)


def _salvage(old: Path, place: Path, index: Index) -> None:
    """Delete the files of `old` that its own index names, and move all others into `place`.

    What cannot be moved, because its name is taken there, stays where it is.
    """
    with contextlib.suppress(VarDeployError):  # another index: nothing is known to be ours
        for name in (*index.listed(old), index.name):
            with contextlib.suppress(FileNotFoundError):
                (old / name).unlink()
    remove_dead_files(old)
    if place.is_dir():
        _move_over(old, place)
    else:
        _remove_empty(old)


def _move_over(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        there = target / path.name
        both = [p.is_dir() and not p.is_symlink() for p in (path, there)]
        if all(both):
            _move_over(path, there)
        elif both[0] and not any(path.iterdir()):
            path.rmdir()
        elif not os.path.lexists(there):
            path.rename(there)
        elif is_scratch(path.name):
            shutil.rmtree(path) if both[0] else path.unlink()
    with contextlib.suppress(OSError):  # not empty: see `_salvage`
        source.rmdir()


# putting it in its place


def _exchange(work: Path, place: Path, check: Callable[[], None]) -> None:
    """The complete folder takes the place of `place`, which lies in the work folder then."""
    complete = work / COMPLETE
    for attempt in itertools.count():
        with locked_folder(place):
            check()
            if not os.path.lexists(place):
                if _rename_to_free(complete, place):
                    return
                continue  # somebody was faster: look at what is there now
            if swap(complete, place):
                return
            place.rename(work / f"{PREVIOUS}{attempt}")
            if _rename_to_free(complete, place):
                return


def swap(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where this system or file system cannot.

    Raises OSError where it refuses for another reason.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux, or a C library without it
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _rename_to_free(folder: Path, place: Path) -> bool:
    """Rename a folder to a place that is free, or an empty folder; False where it is neither."""
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return False
    return True


def _fill(complete: Path, place: Path, check: Callable[[], None]) -> None:
    """The same for a place that is new or empty, entry by entry where it cannot be renamed over."""
    check()
    if not must_write_inside(place) and _rename_to_free(complete, place):
        return
    with locked_folder(place):
        check()
        for path in sorted(complete.iterdir()):
            path.rename(place / path.name)


def _install(work: Path, place: Path, index: Index, check: Callable[[], None]) -> None:
    """Move the complete folder into `place`, whose index goes first and comes back last."""
    with locked_folder(place):
        check()
        (work / STARTED).touch()
        try:
            _finish_install(work, place, index)
        except BaseException:  # these are renames: finishing them is safer than going back
            _finish_install(work, place, index)
            raise


def _finish_install(work: Path, place: Path, index: Index) -> None:
    """Begin, or go on after it was cut off anywhere."""
    complete, old = work / COMPLETE, work / OLD_INDEX
    if not (complete / index.name).exists():
        return  # done
    if not old.exists():
        old.mkdir()
    if (place / index.name).exists():
        (place / index.name).replace(old / index.name)
    new = index.listed(complete)
    for name in set(index.listed(old)) - set(new):
        with contextlib.suppress(FileNotFoundError):
            (place / name).unlink()
        _remove_empty((place / name).parent, above=place)
    for name in new:
        if (complete / name).exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (complete / name).replace(place / name)
    (complete / index.name).replace(place / index.name)


# small things


def _walk(folder: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Every path below a folder that counts, links as such; a folder before what is in it."""
    for name in entries_that_count(folder):
        if name in without:
            continue
        path = folder / name
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _leads_to(name: str, own: Collection[str]) -> bool:
    return any(path.startswith(f"{name}/") for path in own)


def _remove_empty(folder: Path, above: Path | None = None) -> None:
    """Remove folders in `folder` that hold no file, then `folder`, and with `above` its parents."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            _remove_empty(path)
    with contextlib.suppress(OSError):
        while folder != above:
            folder.rmdir()
            if above is None:
                break
            folder = folder.parent


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as stream:
                sync(stream)
    sync_folder(folder)


def _writable(folder: Path) -> bool:
    try:
        check_writable(folder)
    except UsageError:
        return False
    return True


def _holds_mount(folder: Path) -> bool:
    """Whether a file system is mounted on a folder or below it."""
    if os.path.ismount(folder):
        return True
    try:
        # ismount does not see a folder of the same disk that is mounted here, as containers do
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    own = os.fsencode(folder)
    for line in lines:
        escaped = line.split()[4]
        point = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), escaped)
        if point == own or point.startswith(own.rstrip(b"/") + b"/"):
            return True
    return False
