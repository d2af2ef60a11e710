"""Paths for libraries that take text: on Linux a file name is bytes, which need not be UTF-8."""

from __future__ import annotations

import os
from pathlib import Path

from var_deploy.errors import UsageError


def utf8_path(path: Path, library: str) -> str:
    """Return the path in a form that a library which takes only UTF-8 can open.

    It is relative to the current folder where the part that is not UTF-8 lies above that folder.

    Raises UsageError where the path cannot be written in UTF-8.
    """
    for text in (os.fspath(path), os.path.relpath(path)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            continue
        return text
    raise UsageError(
        f"{path} is not UTF-8, and {library} cannot open it: rename it, or change into the "
        "folder and name it from there"
    )
