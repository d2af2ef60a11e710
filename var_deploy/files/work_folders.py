"""Work folders: where a folder is written before it takes its place, and what dead writers left.

    .bundle.partial-1f2e…/     beside bundle/, on the same file system, or in it
      lock                     held while its process lives; the name of the folder it is for
      incomplete/              being written; may be deleted
      complete/                whole. Before the exchange the new folder, after it the old one
      previous0/               where the system cannot exchange: the old folder, moved aside
      started, old-index/      of a folder that is written from inside: the old folder's index

The next writer of the same folder recognises what a dead one left by the lock that nobody holds,
and removes it, but nothing that an old folder's index does not name.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from var_deploy.errors import VarDeployError
from var_deploy.files import NAME_SHOWN, is_scratch, is_temporary, lock_file, remove_dead_files

LOCK, INCOMPLETE, COMPLETE, PREVIOUS = "lock", "incomplete", "complete", "previous"
OLD_INDEX, STARTED = "old-index", "started"
FOREIGN_AGE = 86_400.0  # seconds after which another machine's work folder is taken for dead
WORK_FOLDER = re.compile(r"\..*\.partial-[0-9a-f]{16}", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Index:
    """The file in which a folder of some kind lists its own files.

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
        """Return the first path in `folder` that is neither listed nor left by an operating
        system."""
        own = {self.name, *self.listed(folder)}
        for path in _walk(folder, without=self.kept):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                # a folder that holds files is examined file by file
                if name in own or (not any(path.iterdir()) and not _leads_to(name, own)):
                    return name
            elif name not in own:
                return name
        return None


def entries_that_count(folder: Path) -> list[str]:
    """Return sorted names of the user's entries of a folder: without any, the folder is empty.

    Files that operating systems leave in any folder do not count, nor do files that are just being
    written.
    """
    return sorted(
        name
        for name in os.listdir(folder)
        if not (is_scratch(name) or is_temporary(name) or WORK_FOLDER.fullmatch(name))
    )


def remove_leftovers(path: Path, index: Index | None) -> None:
    """Remove the work folders that killed writers of `path` left, after saving the user's files in
    them.

    A folder whose lock is held stays, and one that cannot be removed.
    """
    place = Path(os.path.realpath(path))
    for parent in (place.parent, place):
        with contextlib.suppress(OSError):
            for name in os.listdir(parent):
                if name.startswith(_prefix(place)) and WORK_FOLDER.fullmatch(name):
                    _remove_leftover(parent / name, place, index)


@contextlib.contextmanager
def work_folder(place: Path, index: Index | None, *, inside: bool) -> Iterator[Path]:
    """Yield a new work folder whose lock is held; it is deleted with its contents at the end."""
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
        # without locks no other writer can lock it and take it for dead
        if lock_file(lock) is not False and (work / LOCK).exists():
            return work, lock
        lock.close()


def _owner(place: Path) -> bytes:
    """Return what a lock file says: which machine writes which folder."""
    import socket

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
                finish_install(work, place, index)
            _clear(work, place, index)


def _clear(work: Path, place: Path, index: Index | None) -> None:
    """Remove a work folder, but no file of the user's folder that its index does not list."""
    shutil.rmtree(work / INCOMPLETE, ignore_errors=True)
    complete, aside = work / COMPLETE, sorted(work.glob(f"{PREVIOUS}*"))
    if index is not None and (work / STARTED).exists() and (complete / index.name).exists():
        return  # could not be finished, and may be by the next writer
    if aside and not os.path.lexists(place):
        aside[-1].rename(place)  # killed between two renames
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


def finish_install(work: Path, place: Path, index: Index) -> None:
    """Install the complete folder from inside, or resume after any interruption."""
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


def _walk(folder: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Yield every path below a folder that counts, links as links; a folder before its content."""
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
