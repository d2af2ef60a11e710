"""Remembers hashes of files from one process to the next, so that unchanged files are read once.

The record says: a file with this device, inode, size, time of the last write and time of the last
change had this SHA-256. Only the system sets the time of the last change, so whoever writes to the
file, or puts another one in its place, changes its identity. The record lies in the user's cache:
who can write there is believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_deploy.errors import VarDeployError
from var_deploy.files import whole_file
from var_deploy.files.cache import cache_folder
from var_deploy.files.held_files import Identity, open_regular

NAME = "hashes.json"
VERSION = 1
MOST_ENTRIES, MOST_BYTES = 512, 1 << 18  # of the record; the oldest entries go first
# Seconds without a change before a file is taken in. Linux writes changed pages of a shared mapping
# back within 35 s; until then a page may change once more without a new time.
RECENT = 60.0
FINEST = 1_000_000  # ns; coarser times are those of file systems without a time of change (FAT)

_KEY = re.compile(r"[0-9]{1,20}(-[0-9]{1,20}){4}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HashRecord:
    """Hashes of files, and facts that follow from hashes, that processes of this user have found.

    Nothing here raises: a record that is missing, damaged, too large or not the user's own is
    empty, and one that cannot be written is not written. Usable from several threads.

    Args:
        path: of the record's file; None takes the one in the user's cache.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            with contextlib.suppress(RuntimeError):  # no home
                path = cache_folder() / NAME
        # Windows has no time of change: a file could be written to and get its old times again
        self._path = None if sys.platform == "win32" else path
        self._lock = threading.Lock()
        self._known: dict[str, str] | None = None
        self._new: dict[str, str] = {}

    def sha256(self, identity: Identity) -> str | None:
        """Return the hash of a file with this identity, None where it is not known."""
        return self._find(_key(identity)) if _is_steady(identity) else None

    def add_sha256(self, identity: Identity, sha256: str) -> None:
        """Take in the hash of a file whose identity was equal before and after it was read."""
        if _is_steady(identity):
            self._add(_key(identity), sha256)

    def has_fact(self, fact: str) -> bool:
        """Whether `add_fact` was called, by any process, with a fact: the SHA-256 of a statement
        about content that is itself named by hashes."""
        return self._find(fact) == fact

    def add_fact(self, fact: str) -> None:
        self._add(fact, fact)

    def save(self) -> None:
        """Write what was added, together with what other processes have written meanwhile."""
        with self._lock:
            if not self._new or self._path is None:
                return
            entries = self._read()
            for key, value in self._new.items():
                entries.pop(key, None)  # to the end: the newest go last
                entries[key] = value
            entries = dict(list(entries.items())[-MOST_ENTRIES:])
            self._known, self._new = entries, {}
            data = json.dumps({"version": VERSION, "entries": entries}, indent=0)
            with contextlib.suppress(VarDeployError, OSError):  # as in a home that is read-only
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with whole_file(self._path, follow=False) as stream:
                    os.fchmod(stream.fileno(), 0o600)
                    stream.write(data.encode())

    def _find(self, key: str) -> str | None:
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return self._new.get(key) or self._known.get(key)

    def _add(self, key: str, value: str) -> None:
        with self._lock:
            self._new[key] = value

    def _read(self) -> dict[str, str]:
        if self._path is None:
            return {}
        try:
            with os.fdopen(open_regular(self._path), "rb") as stream:
                if not _is_private(os.fstat(stream.fileno())):
                    return {}
                return _entries(json.loads(stream.read(MOST_BYTES + 1)[:MOST_BYTES]))
        except (OSError, ValueError, RecursionError):
            return {}


def _entries(data: Any) -> dict[str, str]:
    """Return the entries of a record's JSON; {} where it is not in the form that `save` writes."""
    if not isinstance(data, Mapping) or data.get("version") != VERSION:
        return {}
    entries = data.get("entries")
    if not isinstance(entries, dict) or len(entries) > MOST_ENTRIES:
        return {}
    for key, value in entries.items():
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            return {}
        if key != value and not _KEY.fullmatch(key):
            return {}
    return entries


def _is_private(found: os.stat_result) -> bool:
    """Whether the file is the user's own, and no other user may write to it."""
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_steady(identity: Identity) -> bool:
    """Whether every later write would change the identity."""
    device, inode, _, written, changed = identity
    age = time.time() - max(written, changed) / 1e9
    return bool(device and inode) and changed % FINEST != 0 and age >= RECENT


def _key(identity: Identity) -> str:
    return "-".join(map(str, identity))
