"""Reads untrusted JSON files within bounds, and takes them apart value by value.

A file is refused before it is read where it is not a regular file or too large. A `Value` knows its
place in the file, so that a refusal names the place, the value found and the value expected.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_deploy.files.held_files import open_regular

LONGEST_SHOWN = 60  # characters of a wrong value in a message
LONGEST_TEXT = 1000  # characters of a name or a label
# half of a pair of \u escapes: no such text can be printed or hashed
_SURROGATE = re.compile(rb"\\u[dD][89abAB]")


class DamagedError(ValueError):
    """A value does not have the expected format; the message has the place, the value and the
    format."""


def read_json(path: Path, most: int, *, folder: int | None = None) -> Any:
    """Read a JSON file of at most `most` bytes.

    Args:
        folder: descriptor of the folder that `path` is relative to; None takes `path` as it is.

    Raises FileNotFoundError, NotADirectoryError or another OSError where it cannot be opened or is
    not a regular file, and ValueError where it is too large or not JSON.
    """
    file = open_regular(path, folder)
    with os.fdopen(file, "rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most >> 20} MiB")
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """Parse JSON in which no member is there twice. Raises ValueError where it is not that."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
        if _SURROGATE.search(data):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in members if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return members


def shown(value: object) -> str:
    """Return a value for a message: on one line, cut where it is long."""
    try:
        plain = isinstance(value, str) and value.isprintable()
        text = repr(value) if plain else ascii(value)
    except ValueError:  # an integer of more digits than Python turns into text
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"


def _place(place: str) -> str:
    """Return a place for a message, quoted where its names are not plain."""
    plain = place.isprintable() and len(place) <= LONGEST_SHOWN
    return (place or "it") if plain else shown(place)


class Value:
    """A value of a JSON file. Every method raises DamagedError where the value has another format.

    Attributes:
        raw: what `json` made of it.
        place: where it stands, such as "model.tokenizer.vocab_size".
    """

    def __init__(self, raw: Any, place: str = "") -> None:
        self.raw, self.place = raw, place

    def refuse(self, expected: str) -> DamagedError:
        return DamagedError(f"{_place(self.place)} is {shown(self.raw)}, expected {expected}")

    def members(self, most: int = 1 << 20) -> dict[str, Value]:
        """Return the members of an object by name."""
        if not isinstance(self.raw, dict):
            raise self.refuse("an object")
        if len(self.raw) > most:
            raise DamagedError(f"{_place(self.place)} has {len(self.raw)} members, at most {most}")
        return {name: Value(value, self._inner(name)) for name, value in self.raw.items()}

    def member(self, name: str) -> Value:
        """Return a member that must be there."""
        if not isinstance(self.raw, dict):
            raise self.refuse("an object")
        if name not in self.raw:
            raise DamagedError(f"{_place(self._inner(name))} is missing")
        return Value(self.raw[name], self._inner(name))

    def only(self, *names: str) -> Value:
        """Return this object after checking that it has no other members than these."""
        if not isinstance(self.raw, dict):
            raise self.refuse("an object")
        for name in self.raw:
            if name not in names:
                place = _place(self._inner(name))
                raise DamagedError(f"{place} is unknown, expected {', '.join(names)}")
        return self

    def items(self, most: int = 1 << 20) -> list[Value]:
        """Return the items of an array."""
        if not isinstance(self.raw, list):
            raise self.refuse("an array")
        if len(self.raw) > most:
            raise DamagedError(f"{_place(self.place)} has {len(self.raw)} items, at most {most}")
        return [Value(item, f"{self.place}[{number}]") for number, item in enumerate(self.raw)]

    def whole(self, low: int, high: int) -> int:
        """Return a whole number within bounds; true and 1.0 are refused."""
        if type(self.raw) is not int or not low <= self.raw <= high:
            raise self.refuse(f"a whole number from {low} to {high}")
        return self.raw

    def number(self, low: float, high: float) -> float:
        """Return a finite number within bounds."""
        raw = self.raw
        if type(raw) not in (int, float) or not math.isfinite(raw) or not low <= raw <= high:
            raise self.refuse(f"a number from {low:g} to {high:g}")
        return float(raw)

    def flag(self) -> bool:
        if not isinstance(self.raw, bool):
            raise self.refuse("true or false")
        return self.raw

    def text(self, pattern: str = "", expected: str = "text") -> str:
        """Return text of at most LONGEST_TEXT characters that match `pattern` if there is one."""
        good = isinstance(self.raw, str) and len(self.raw) <= LONGEST_TEXT
        if not good or (pattern and not re.fullmatch(pattern, self.raw)):
            raise self.refuse(expected)
        return str(self.raw)

    def words(self) -> str:
        """Return text of any length."""
        if not isinstance(self.raw, str):
            raise self.refuse("text")
        return self.raw

    def one_of(self, *known: str) -> str:
        if not isinstance(self.raw, str) or self.raw not in known:
            raise self.refuse(" or ".join(known))
        return self.raw

    def plain(self) -> Mapping[str, Any]:
        """Return an object of any content, which only people read."""
        if not isinstance(self.raw, dict):
            raise self.refuse("an object")
        return dict(self.raw)

    def _inner(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name
