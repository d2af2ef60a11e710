"""Reads and parses untrusted request bodies within bounds of memory and time.

The cost of a body is bounded before it is parsed. Text beyond 16 KiB, which only a picture can
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
import mmap
import re
import secrets
import time
from collections.abc import AsyncIterator
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
    """A body did not arrive in time."""


class BodiesFullError(RefusedError):
    """The memory for request bodies is taken by those of other requests."""


class Body:
    """The bytes of one body. Large ones are in pages of their own, which `close` returns."""

    def __init__(self, small: int, limit: int) -> None:
        self._small, self._limit, self._length = small, limit, 0
        self._data: bytearray | mmap.mmap = bytearray()

    def __len__(self) -> int:
        return self._length

    def append(self, part: bytes) -> None:
        """Append bytes. Raises BodyTooLargeError beyond the limit."""
        end = self._length + len(part)
        if end > self._limit:
            raise too_large(self._limit)
        if end > self._small and isinstance(self._data, bytearray):
            pages = mmap.mmap(-1, self._limit)
            pages[: self._length] = bytes(self._data)
            self._data = pages
        self._data[self._length : end] = part
        self._length = end

    def find(self, byte: bytes, start: int) -> int:
        """Return the first position of `byte` from `start` on; -1 where there is none."""
        return self._data.find(byte, start, self._length)

    def part(self, start: int, end: int) -> bytes:
        """Return a copy of the bytes from `start` to `end`."""
        return bytes(self._data[start : min(end, self._length)])

    def close(self) -> None:
        """Release the memory; the body is empty afterwards."""
        if isinstance(self._data, mmap.mmap):
            self._data.close()
        self._data, self._length = bytearray(), 0


class BodyMemory:
    """Reads request bodies, all of which together have at most `Settings.bodies` bytes."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._held = settings, 0

    @contextlib.asynccontextmanager
    async def read(self, receive: Receive, limit: int) -> AsyncIterator[Body]:
        """Read the body of a request; its memory is released at the end of the block.

        Raises BodyTooLargeError beyond `limit` bytes, BodyTooSlowError where it arrives too slowly,
        BodiesFullError where all bodies together are too large, and GoneError.
        """
        settings, taken = self._settings, 0
        body = Body(settings.plain_body, limit)
        began = time.monotonic()
        try:
            more = True
            while more:
                end = began + settings.body_seconds + len(body) / settings.body_rate
                message = await _within(receive, end - time.monotonic(), settings)
                if message["type"] != "http.request":
                    raise GoneError
                part, more = message.get("body", b""), message.get("more_body", False)
                needed = max(len(body) + len(part) - settings.plain_body, 0)
                if needed > taken and len(body) + len(part) <= limit:
                    self._take(needed - taken)
                    taken = needed
                body.append(part)
            yield body
        finally:
            self._held -= taken
            body.close()

    def _take(self, count: int) -> None:
        if self._held + count > self._settings.bodies:
            raise BodiesFullError("the service is busy with other pictures; come back later", 2)
        self._held += count


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

    def __init__(self, body: Body, start: int, end: int) -> None:
        self._body, self._start, self._end = body, start, end

    def __len__(self) -> int:
        return self._end - self._start

    def base64(self) -> io.BytesIO:
        """The bytes that it encodes; the head of a data: URL is skipped. Raises ValueError."""
        start, decoded, rest = self._payload(), io.BytesIO(), b""
        while start < self._end:
            part = self._body.part(start, min(start + PIECE, self._end))
            cut = part.rfind(b"\\", max(len(part) - 6, 1))  # an escape stays in one piece
            if cut > 0 and start + len(part) < self._end:
                part = part[:cut]
            start += len(part)
            text = part.decode("ascii")
            rest += (json.loads(f'"{text}"') if "\\" in text else text).encode("ascii")
            whole = len(rest) if start >= self._end else (len(rest) - 1) // 4 * 4
            now, rest = rest[:whole], rest[whole:]
            if rest and b"=" in now:
                raise binascii.Error("padding before the end")
            decoded.write(base64.b64decode(now, validate=True))
        decoded.seek(0)
        return decoded

    def _payload(self) -> int:
        head = self._body.part(self._start, min(self._start + DATA_URL, self._end))
        if not head.startswith(b"data:"):
            return self._start
        comma = head.find(b",")
        return self._start + comma + 1 if comma >= 0 else self._end


def parse_body(body: Body, settings: Settings, texts: frozenset[str]) -> Any:
    """The JSON value in a body. Texts of the fields `texts` become EncodedText.

    Raises UsageError for what is not JSON, and for what is longer or nested deeper than any request
    needs to be.
    """
    most = max(SHORTEST_LIST, settings.count)
    outline, long = _outline(body, settings.plain_body)
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
        if name in texts and isinstance(item, str):
            fields[name] = long.get(item) or _encoded(item)
        else:
            fields[name] = _bounded(name, item, long, most)
    return fields


class _Pairs(list[tuple[str, Any]]):
    """An object, its names not yet compared."""


def _outline(body: Body, limit: int) -> tuple[bytearray, dict[str, EncodedText]]:
    """The body with a short name in place of every long text, and these texts by their names."""
    mark = f"text-{secrets.token_hex(8)}-"  # random, so that no client can have sent it
    outline, long = bytearray(), dict[str, EncodedText]()
    kept = end = 0  # up to where the body is copied; up to where it is looked at
    for _ in range(limit):
        start = body.find(b'"', end) + 1
        if not start:
            break
        end = _end_of_text(body, start, limit)
        if end - start > LONG:
            name = f"{mark}{len(long)}"
            long[name] = EncodedText(body, start, end)
            _copy(outline, body, kept, start, limit)
            outline += name.encode()
            kept = end
        end += 1
    _copy(outline, body, kept, len(body), limit)
    return outline, long


def _end_of_text(body: Body, start: int, limit: int) -> int:
    """Where the quote is that ends the text from `start` on."""
    end = start
    for _ in range(limit):
        end = body.find(b'"', end)
        if end < 0:
            raise UsageError("the body is not JSON")
        before = body.part(max(start, end - ESCAPES), end)
        escapes = len(before) - len(before.rstrip(b"\\"))
        if escapes == ESCAPES:
            break
        if escapes % 2 == 0:
            return end
        end += 1
    raise UsageError("the body: a text has more quotes or backslashes than this service takes")


def _copy(outline: bytearray, body: Body, start: int, end: int, limit: int) -> None:
    if len(outline) + end - start > limit:
        raise BodyTooLargeError(
            f"the request has more than {limit} bytes besides its pictures, which is more than "
            "this service takes"
        )
    outline += body.part(start, end)


def _bounded(name: str, item: Any, long: dict[str, EncodedText], most: int) -> Any:
    """A value of a field, once it is known to be one value or a short list of such."""
    items = item if type(item) is list else [item]
    if len(items) > most:
        raise UsageError(f"{_short(name)}: {len(items)} values, where at most {most} are taken")
    for one in items:
        if isinstance(one, list):
            raise UsageError(f"{_short(name)}: expected values or one list, found {_kind(one)}")
        # among labels null is the image without a class
        if items is item and one is None and name not in ("label", "labels"):
            raise UsageError(f"{_short(name)}: the list holds null, which is no value of its own")
        if isinstance(one, str) and one in long:
            raise UsageError(
                f"{_short(name)}: a text of {len(long[one])} bytes, where at most {LONG} are taken"
            )
    return item


def _encoded(text: str) -> EncodedText:
    raw = json.dumps(text).encode()[1:-1]
    body = Body(len(raw), len(raw))
    body.append(raw)
    return EncodedText(body, 0, len(raw))


def _kind(value: Any) -> str:
    kinds = {_Pairs: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _short(name: str) -> str:
    """A field's name for a message: printable, and not longer than makes sense."""
    name = re.sub(r"[^\x20-\x7e]", "?", name[: SHOWN + 1])
    return name if len(name) <= SHOWN else name[:SHOWN] + "…"
