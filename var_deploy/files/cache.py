"""The folder of the user's cache, where this package keeps what it can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAME = "var-deploy"


def cache_folder() -> Path:
    """Return the folder for this package in the user's cache; it need not exist.

    $XDG_CACHE_HOME/var-deploy where that is an absolute path (XDG Base Directory Specification),
    else below ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows and ~/.cache elsewhere. Raises
    RuntimeError where the user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given, NAME)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / NAME
    local = os.environ.get("LOCALAPPDATA", "")
    if sys.platform == "win32" and os.path.isabs(local):
        return Path(local, NAME)
    return Path.home() / ".cache" / NAME
