"""Writes folders atomically, and replaces a folder without losing the user's files in it.

Everything is written into a work folder first (see `var_deploy.files.work_folders`), and exchanged
with the old folder when it is complete. A kill at any moment leaves the old folder or the new one
at its place. Where an exchange is not possible there are two renames: a kill between them leaves
neither, until the next writer puts the old folder back.

A folder that cannot be renamed is written from inside: a mount point or a folder that holds one,
the current folder of this process, a folder whose parent cannot be written. Its index file is
removed first and written last, so a reader never finds half of each.

Files that the index of an old folder does not name are never deleted: they are moved into the new
folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from var_deploy.errors import UsageError, VarDeployError
from var_deploy.files import (
    check_ordinary,
    check_writable,
    disk_errors,
    locked_folder,
    sync,
    sync_folder,
)
from var_deploy.files.work_folders import (
    COMPLETE,
    INCOMPLETE,
    PREVIOUS,
    STARTED,
    Index,
    finish_install,
    remove_leftovers,
    work_folder,
)

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of <fcntl.h> and <linux/fs.h>
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@contextlib.contextmanager
def whole_folder(
    path: Path,
    *,
    check: Callable[[], None],
    index: Index | None = None,
    error: type[VarDeployError] = VarDeployError,
) -> Iterator[Path]:
    """Yield a new folder that takes the place of `path` when the block ends, whole or not at all.

    Without `index`, `path` must be new or empty by then. With `index`, a folder that has such an
    index file is replaced: the files that the index names are deleted, all others move into the
    new folder. A link at `path` is followed. Parents are made. The new folder has the permissions
    that the umask gives.

    Args:
        check: called before anything is written and again right before the folder takes its place,
            with `path` locked; raises UsageError where `path` holds files that must stay.
        error: raised where the disk refuses.
    """
    place = Path(os.path.realpath(path))
    with locked_folder(place):  # not in the middle of another writer's exchange
        check()
    with disk_errors(path, error):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path, index)
        inside = must_write_inside(place)
        with work_folder(place, index, inside=inside) as work:
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
    """Yield a work folder whose files move into `folder` when the block ends.

    `folder` is made if it is missing; files of other names in it stay, files of the same names are
    replaced. Raises UsageError where one of the names is a folder there, VarDeployError where the
    disk refuses.
    """
    place = Path(os.path.realpath(folder))
    with disk_errors(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place, None)
        with work_folder(place, None, inside=place.is_dir()) as work:
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


def _exchange(work: Path, place: Path, check: Callable[[], None]) -> None:
    """Put the complete folder at `place`; the old folder lies in the work folder then."""
    complete = work / COMPLETE
    for attempt in itertools.count():
        with locked_folder(place):
            check()
            if not os.path.lexists(place):
                if _rename_to_free(complete, place):
                    return
                continue  # another writer was faster: look at what is there now
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
    """Rename a folder to a place that is free or an empty folder; False where it is neither."""
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return False
    return True


def _fill(complete: Path, place: Path, check: Callable[[], None]) -> None:
    """Move a folder to a place that is new or empty, entry by entry where it cannot be renamed."""
    check()
    if not must_write_inside(place) and _rename_to_free(complete, place):
        return
    with locked_folder(place):
        check()
        for path in sorted(complete.iterdir()):
            path.rename(place / path.name)


def _install(work: Path, place: Path, index: Index, check: Callable[[], None]) -> None:
    """Move the complete folder into `place`, whose index is removed first and written last."""
    with locked_folder(place):
        check()
        (work / STARTED).touch()
        try:
            finish_install(work, place, index)
        except BaseException:  # these are renames: finishing them is safer than going back
            finish_install(work, place, index)
            raise


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
