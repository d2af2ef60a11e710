"""Files of class names: one name per line, or a JSON list of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from var_deploy.bundle.json_values import LONGEST_TEXT
from var_deploy.errors import UsageError, one_line
from var_deploy.files.held_files import open_regular

MOST_BYTES = 1 << 24


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in a text file in UTF-8, index = label; what begins with "[" is a JSON list.

    Raises UsageError for a file that cannot be read, for a name that is empty, too long or not one
    line of text, and for a list that holds anything else.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read: "
        why += "" if isinstance(error, FileNotFoundError) else error.strerror or one_line(error)
        raise UsageError(f"the class names {path}: the file {why}") from None
    if len(data) > MOST_BYTES:
        raise UsageError(f"the class names {path}: more than {MOST_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"the class names {path}: the file is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise UsageError(
            f"the class names {path}: it begins with [, but is not a JSON list"
        ) from None
    for n, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"the class names {path}: class {n} has no name, found {name!r:.60}")
        if len(name) > LONGEST_TEXT or not name.strip().isprintable():
            raise UsageError(
                f"the class names {path}: class {n} is not one line of at most {LONGEST_TEXT} "
                f"printable characters, found {name!r:.60}"
            )
    if not names:
        raise UsageError(f"the class names {path}: the file holds no names")
    return tuple(name.strip() for name in names)
