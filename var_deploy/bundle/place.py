"""Checks where a bundle may be written: a new folder, an empty one, or one with another bundle.

Of an old bundle only the files that its manifest names are replaced. Engines belong to it and stay,
stale where the graphs differ. Any other file is the user's, and the export is refused.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.files import locked_folder
from var_deploy.files.folders import check_folder_writable
from var_deploy.files.work_folders import Index, entries_that_count, remove_leftovers

MOST_BYTES = 64 << 20  # most bytes of a manifest, whose size grows with graphs and labels


def check_before_work(out: Path, *, replace: bool) -> None:
    """Run `check_place` before a command begins; `folders.whole_folder` runs it again at the
    end."""
    with locked_folder(out):
        check_place(out, replace=replace)


def check_place(out: Path, *, replace: bool) -> None:
    """Raise UsageError where `out` cannot be written, or holds files that an export must not
    replace.

    With `replace`, `out` may hold another bundle with its engines, and nothing else. Leftovers of a
    killed export are removed first.
    """
    remove_leftovers(out, BUNDLE)
    check_folder_writable(out)
    if not out.is_dir():
        return
    held = entries_that_count(out)
    if names.MANIFEST not in held:
        held = [name for name in held if name != names.ENGINES] if replace else held
        if held:
            raise UsageError(
                f"{out} is not empty and holds no bundle ({held[0]} is there); choose another "
                "folder"
            )
        return
    listed_files(out)
    if not replace:
        raise UsageError(f"{out} already holds a bundle; --force replaces it")
    foreign = BUNDLE.foreign(out)
    if foreign is not None:
        raise UsageError(
            f"{out} holds {foreign}, which is not part of the bundle there; move it away, or "
            "choose another folder"
        )


def listed_files(folder: Path) -> Collection[str]:
    """Return relative paths of the files that a folder's manifest names; none without a manifest.

    Read leniently, since a damaged bundle may be replaced too. Raises UsageError where
    manifest.json is not one of var-deploy.
    """
    path = folder / names.MANIFEST
    try:
        data = _read(path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        data = None
    files = data.get("files") if isinstance(data, dict) else None
    ours = isinstance(data, dict) and {"schema_version", "model", "graphs"} <= data.keys()
    if not ours or not isinstance(files, dict) or not all(map(_is_normal, files)):
        raise UsageError(
            f"{path} is not a var-deploy manifest, so the folder is left alone; delete it "
            "yourself, or choose another folder"
        )
    return list(files)


def _read(path: Path) -> Any:
    """Read JSON from a regular file of bounded size. Raises OSError and ValueError."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # not waiting for a pipe
    with open(handle, encoding="utf-8") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("not an ordinary file")
        text = stream.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError("too long")
    return json.loads(text)


def _is_normal(name: str) -> bool:
    pure = PurePosixPath(name)
    plain = "\\" not in name and "\0" not in name and str(pure) == name != "."
    return plain and not pure.is_absolute() and ".." not in pure.parts


BUNDLE = Index(name=names.MANIFEST, listed=listed_files, kept=(names.ENGINES,))
