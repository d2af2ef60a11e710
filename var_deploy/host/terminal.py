"""What every program of the package needs before it prints: streams that are there, characters that
they can encode, and no text from elsewhere that steers a terminal.

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
JOINERS = "\u200c\u200d"  # Persian, Indian scripts and emoji need them; they steer nothing


def open_standard_streams() -> None:
    """Give the process the standard streams that it was started without, and make those that are
    there write every character.

    Where a descriptor of 0 to 2 is closed (`2>&-`), the next file that is opened would get its
    number, and what a library writes to "standard error" would end up in that file: such a
    descriptor is opened on the null device. Where Python has no stream (`pythonw`), it gets one
    that leads there. A character that the encoding of a stream lacks is written in a plain form:
    2⁶⁴ as 2^64, a character without such a form as a question mark.
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
    """Whether what is written to a stream is seen on a terminal; False where there is none."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def visible(text: str, *, lines: bool = False) -> str:
    """A text in which nothing steers a terminal or turns the direction of writing.

    Control characters (escape sequences begin with one), marks of direction, invisible formats,
    line separators and bytes of a file name that are no text are written as \\x1b, \\u202e, …;
    with `lines` the newlines stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escape(char) if _steers(char) and not (lines and char == "\n") else char for char in text
    )


def visible_json(text: str) -> str:
    """JSON, as `json.dumps` writes it with `ensure_ascii=False`, with the characters that `visible`
    replaces written as JSON writes them: \\u001b. The newlines between values stay."""
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
