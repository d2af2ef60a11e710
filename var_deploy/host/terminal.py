"""Safe output to a terminal: opens missing standard streams, replaces characters that a stream
cannot encode, and escapes control characters in text of other origin.

Imports nothing heavy: it runs before click and numpy are imported.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import unicodedata
from typing import TextIO

INTERRUPTED = 130  # what shells report for Ctrl-C
PLAIN_FORMS = "var_deploy.plain_forms"  # the name of the error handler for encoders
PLAIN = {
    "…": "...",
    "×": "x",
    "·": ".",
    "–": "-",
    "→": "->",
    "≤": "<=",
    "∞": "inf",
    "φ": "phi",
    "█": "#",
    "─": "-",
    "│": "|",
    "├": "|",
    "└": "`",
    "►": ">",
}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹ᵀ", "0123456789T")
JOINERS = "\u200c\u200d"  # needed by Persian, Indian scripts and emoji; no control characters


def open_standard_streams() -> None:
    """Open missing standard streams, and make all streams able to write every character.

    A closed descriptor 0 to 2 (`2>&-`) is opened on the null device: otherwise the next opened file
    would get its number, and a library's output to "standard error" would go to that file. A stream
    that Python lacks (`pythonw`) is opened on the null device too. A character that is not in a
    stream's encoding is written in a plain form: 2⁶⁴ as 2^64; without a plain form, as "?".
    """
    for number in range(3):  # in order: the lowest free number is what `open` takes
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAIN_FORMS)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; False for None and for a closed stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def visible(text: str, *, lines: bool = False) -> str:
    """Escape all characters of a text that could control a terminal or change writing direction.

    Control characters (which begin escape sequences), direction marks, invisible formats, line
    separators and undecodable bytes of file names are written as \\x1b, \\u202e, …; with `lines`
    newlines are kept.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escape(char) if _steers(char) and not (lines and char == "\n") else char for char in text
    )


def visible_json(text: str) -> str:
    """Escape in JSON text the characters that `visible` escapes, as JSON does: \\u001b.

    `text` comes from `json.dumps` with `ensure_ascii=False`; newlines between values are kept.
    """
    return "".join(
        "".join(f"\\u{unit:04x}" for unit in _utf16(char))
        if char != "\n" and _steers(char)
        else char
        for char in text
    )


def _steers(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in JOINERS


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte, as Python keeps it in file names
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def _utf16(char: str) -> list[int]:
    data = char.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[n : n + 2], "big") for n in range(0, len(data), 2)]


def _plain_forms(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    powers = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹ᵀ]+", lambda found: "^" + found[0].translate(SUPERSCRIPTS), text)
    plain = "".join(PLAIN.get(char, char if char.isascii() else "?") for char in powers)
    return plain, error.end


codecs.register_error(PLAIN_FORMS, _plain_forms)
