"""Bodies of requests: read within their limits, and taken apart without being believed.

What a body may cost is settled before it is parsed. Text beyond 16 KiB, which only a picture can
be, stays where it lies in the body as an `EncodedText`; what is left is small, and becomes Python
values with bounded lists and without nesting.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import json
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

from starlette.types import Message, Receive

from var_deploy.errors import UsageError
from var_deploy.serving.backend import RefusedError
from var_deploy.serving.events import GoneError
from var_deploy.serving.settings import Settings

LONG = 16384  # bytes of a text that is not parsed with the rest
SHORTEST_LIST = 1024  # items that every list may have, whatever the settings are
FIELDS = 64  # of an object
ESCAPES = 256  # backslashes in a row
SHOWN = 60  # characters of a name that a message repeats
PIECE = 1 << 18  # bytes that are decoded at a time: other threads get their turn in between
DATA_URL = 1024  # bytes in which the comma of a data: URL must come


class BodyTooLargeError(UsageError):
    """A body has more bytes than its route takes."""


class BodyTooSlowError(UsageError):
    """A body did not come in time."""


class BodiesFullError(RefusedError):
    """Other bodies take the memory that there is for them."""


class BodyMemory:
    """The bytes that the bodies of all requests may hold together."""

    def __init__(self, size: int) -> None:
        self._size, self.held = size, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[BodyShare]:
        """A share of one request, which is given back at the end of the block."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self.held -= share.taken

    def take(self, count: int) -> None:
        if self.held + count > self._size:
            raise BodiesFullError("the service is busy with other pictures; come back later", 2)
        self.held += count


class BodyShare:
    """What one request has taken of a `BodyMemory`."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory, self.taken = memory, 0

    def take(self, count: int) -> None:
        """Take `count` bytes more. Raises BodiesFullError."""
        self._memory.take(count)
        self.taken += count


async def read_body(
    receive: Receive, settings: Settings, share: BodyShare, limit: int
) -> bytearray:
    """The body of a request.

    Raises BodyTooLargeError beyond `limit` bytes, BodyTooSlowError where it comes too slowly,
    BodiesFullError where all bodies together are too large, and GoneError.
    """
    body = bytearray()
    began = time.monotonic()
    while True:
        end = began + settings.body_seconds + len(body) / settings.body_rate
        message = await _within(receive, end - time.monotonic(), settings)
        if message["type"] != "http.request":
            raise GoneError
        part = message.get("body", b"")
        if len(body) + len(part) > limit:
            raise too_large(limit)
        beyond = len(body) + len(part) - settings.plain_body  # small bodies are always taken
        if beyond > share.taken:
            share.take(beyond - share.taken)
        body += part
        if not message.get("more_body", False):
            return body


def too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request has more than the {limit} bytes that this route takes")


async def _within(receive: Receive, seconds: float, settings: Settings) -> Message:
    try:
        return await asyncio.wait_for(receive(), max(seconds, 0))
    except asyncio.TimeoutError:
        raise BodyTooSlowError(
            f"the body did not come in time: {settings.body_seconds:g} s, and one more for each "
            f"{settings.body_rate} bytes"
        ) from None


# JSON


class EncodedText:
    """A text of a JSON body as it lies there: without its quotes, escapes not yet resolved."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw)

    def base64(self) -> io.BytesIO:
        """The bytes that it encodes; the head of a data: URL is skipped. Raises ValueError."""
        start, decoded, rest = self._payload(), io.BytesIO(), b""
        while start < len(self._raw):
            part = bytes(self._raw[start : start + PIECE])
            cut = part.rfind(b"\\", max(len(part) - 6, 1))  # an escape stays in one piece
            if cut > 0 and start + len(part) < len(self._raw):
                part = part[:cut]
            start += len(part)
            text = part.decode("ascii")
            rest += (json.loads(f'"{text}"') if "\\" in text else text).encode("ascii")
            whole = len(rest) if start >= len(self._raw) else (len(rest) - 1) // 4 * 4
            now, rest = rest[:whole], rest[whole:]
            if rest and b"=" in now:
                raise binascii.Error("padding before the end")
            decoded.write(base64.b64decode(now, validate=True))
        decoded.seek(0)
        return decoded

    def _payload(self) -> int:
        head = bytes(self._raw[:DATA_URL])
        if not head.startswith(b"data:"):
            return 0
        comma = head.find(b",")
        return comma + 1 if comma >= 0 else len(self._raw)


def parse_body(body: bytearray, settings: Settings, texts: frozenset[str]) -> Any:
    """The JSON value in a body. Texts of the fields `texts` become EncodedText.

    Raises UsageError for what is not JSON, and for what is longer or nested deeper than any request
    needs to be.
    """
    raw, most = memoryview(body), max(SHORTEST_LIST, settings.count)
    outline, long = _outline(body, raw, settings.plain_body)
    try:
        text = outline.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise UsageError("the body is not JSON: it is not UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        raise UsageError("the body is not JSON") from None
    if not isinstance(value, _Pairs):
        raise UsageError(f"the body: expected an object, found {_kind(value)}")
    if len(value) > FIELDS:
        raise UsageError(f"the body: {len(value)} fields, where a request has at most {FIELDS}")
    fields: dict[str, Any] = {}
    for name, item in value:
        if name in long:
            raise UsageError(f"the body: a field has a name of {len(long[name])} bytes")
        if name in fields:
            raise UsageError(f"{_short(name)}: the field is there twice")
        fields[name] = _bounded(name, item, long, most)
        if name in texts and isinstance(item, str):
            fields[name] = long.get(item) or EncodedText(memoryview(_escaped(item)))
    return fields


class _Pairs(list[tuple[str, Any]]):
    """An object, its names not yet compared."""


def _outline(
    body: bytearray, raw: memoryview, limit: int
) -> tuple[bytearray, dict[str, EncodedText]]:
    """The body with a short name in place of every long text, and these texts by their names."""
    mark = f"text-{secrets.token_hex(8)}-"  # which nobody can have sent
    outline, long = bytearray(), dict[str, EncodedText]()
    kept = end = 0  # up to where the body is copied; up to where it is looked at
    for _ in range(limit):
        start = body.find(b'"', end) + 1
        if not start:
            break
        end = _end_of_text(body, raw, start, limit)
        if end - start > LONG:
            name = f"{mark}{len(long)}"
            long[name] = EncodedText(raw[start:end])
            _copy(outline, raw[kept:start], limit)
            outline += name.encode()
            kept = end
        end += 1
    _copy(outline, raw[kept:], limit)
    return outline, long


def _end_of_text(body: bytearray, raw: memoryview, start: int, limit: int) -> int:
    """Where the quote is that ends the text from `start` on."""
    end = start
    for _ in range(limit):
        end = body.find(b'"', end)
        if end < 0:
            raise UsageError("the body is not JSON")
        before = bytes(raw[max(start, end - ESCAPES) : end])
        escapes = len(before) - len(before.rstrip(b"\\"))
        if escapes == ESCAPES:
            break
        if escapes % 2 == 0:
            return end
        end += 1
    raise UsageError("the body: a text has more quotes or backslashes than this service takes")


def _copy(outline: bytearray, part: memoryview, limit: int) -> None:
    if len(outline) + len(part) > limit:
        raise BodyTooLargeError(
            f"the request has more than {limit} bytes besides its pictures, which is more than "
            "this service takes"
        )
    outline += part


def _bounded(name: str, item: Any, long: dict[str, EncodedText], most: int) -> Any:
    """A value of a field, once it is known to be one value or a short list of such."""
    items = item if type(item) is list else [item]
    if len(items) > most:
        raise UsageError(f"{_short(name)}: {len(items)} values, where at most {most} are taken")
    for one in items:
        if isinstance(one, list):
            raise UsageError(f"{_short(name)}: expected values or one list, found {_kind(one)}")
        if items is item and one is None:
            raise UsageError(f"{_short(name)}: the list holds null, which is no value of its own")
        if isinstance(one, str) and one in long and items is item:
            raise UsageError(f"{_short(name)}: the list holds a text of {len(long[one])} bytes")
    if isinstance(item, str) and item in long:
        return long[item]
    return item


def _escaped(text: str) -> bytes:
    return json.dumps(text).encode()[1:-1]


def _kind(value: Any) -> str:
    kinds = {_Pairs: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _short(name: str) -> str:
    """A field's name for a message: printable, and not longer than makes sense."""
    name = re.sub(r"[^\x20-\x7e]", "?", name[: SHOWN + 1])
    return name if len(name) <= SHOWN else name[:SHOWN] + "…"
