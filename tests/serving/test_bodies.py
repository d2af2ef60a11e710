"""Bodies: bounded before they are parsed, read piece by piece, and never guessed at."""

from __future__ import annotations

import base64
import json
import random
import re
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from serving.client import Client, picture

from var_deploy import labels
from var_deploy.errors import LabelError, UsageError

pytest.importorskip("fastapi", reason="the extra serve is not installed")

PICTURES = frozenset({"image", "mask"})
PHOTO = np.random.default_rng(7).integers(0, 256, (90, 90, 3), np.uint8)  # 32 kB as base64


def parsed(text: str | bytes, **limits: Any) -> Any:
    from var_deploy.serving.bodies import Body, parse_body
    from var_deploy.serving.settings import Settings

    settings = Settings(**limits)
    body = Body(settings.plain_body, settings.body)
    body.append(text.encode() if isinstance(text, str) else text)
    fields = parse_body(body, settings, PICTURES)
    return {k: v.base64().read() if k in PICTURES else v for k, v in fields.items()}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 100, 16384, 262143, 262144, 262145, 800_000])
@pytest.mark.parametrize("escape", [None, "/", "+", "A"])
def test_pictures_are_decoded_piece_by_piece(size: int, escape: str | None) -> None:
    """However a program writes them: PHP escapes slashes and .NET plus signs, for instance."""
    data = np.random.default_rng(size).bytes(size)
    text = base64.b64encode(data).decode()
    if escape is not None:
        code = "\\/" if escape == "/" else f"\\u{ord(escape):04X}"
        text = text.replace(escape, code)
    for head in ("", "data:image/png;base64,"):
        whole = '{"seed": 1, "image": "' + head + text + '", "cfg": [1, 2]}'
        assert parsed(whole) == {"seed": 1, "image": data, "cfg": [1, 2]}


@pytest.mark.parametrize("length", [8, 400_000])
@pytest.mark.parametrize(
    "wrong", ["=AAA", "AA=A", "é", "\\n", "\\\\", '\\"', " ", "-", "\\ud800", "A"]
)
def test_what_is_not_base64(length: int, wrong: str) -> None:
    """In a short text and a long one; the last wrong one makes the length wrong."""
    text = "A" * length + wrong + "A" * length
    with pytest.raises(ValueError):
        parsed('{"image": "' + text + '"}')


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 60_000, "not JSON"),
        ('{"seed": ' + "9" * 60_000 + "}", "not JSON"),
        ('{"seed": 1, "seed": 2}', "seed: the field is there twice"),
        ('{"image": "AAAA", "image": "AAAA"}', "image: the field is there twice"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b'{"a": "\xe9"}', "not UTF-8"),
        ("null", "expected an object, found null"),
        ("7", "expected an object, found a number"),
        ('{"labels": [[1]]}', "labels: expected values or one list, found a list"),
        ('{"labels": {"a": 1}}', "labels: expected values or one list, found an object"),
        ('{"seed": [null]}', "seed: the list holds null"),
        ('{"labels": [' + "0," * 1024 + "0]}", "labels: 1025 values, where at most 1024"),
        ('{"label": "' + "x" * 20_000 + '"}', "label: a text of 20000 bytes"),
        ('{"labels": ["' + "x" * 20_000 + '"]}', "labels: a text of 20000 bytes"),
        ('{"' + "x" * 20_000 + '": 1}', "a field has a name of 20000 bytes"),
        ("{" + ",".join(f'"{n}": 0' for n in range(65)) + "}", "65 fields"),
        ('{"image": "' + "\\" * 1000 + '"}', "more quotes or backslashes"),
        ('{"image": "' + '\\"' * 70_000 + '"}', "more quotes or backslashes"),
        ('{"image": "' + "x" * 70_000, "not JSON"),
        ('{"a\x1b[2J": 1}', "not JSON"),
        ("{" + " " * 70_000 + "}", "65536 bytes besides its pictures"),
    ],
)
def test_bodies_that_are_more_than_a_request_needs(text: str | bytes, part: str) -> None:
    with pytest.raises(UsageError) as found:
        parsed(text)
    assert part in str(found.value) and len(str(found.value)) < 200


def test_a_byte_order_mark_is_none_of_the_body() -> None:
    assert parsed(b"\xef\xbb\xbf" + b'{"seed": 3}') == {"seed": 3}


def test_more_images_may_take_more_bytes() -> None:
    from var_deploy.serving.settings import Settings

    assert Settings().plain_body == 65536
    assert Settings(count=5000).plain_body == 320_000
    assert Settings(body=1000).plain_body == 1000
    names = ["x" * 20] * 4000
    assert parsed(json.dumps({"labels": names}), count=5000) == {"labels": names}


MILLIONS = [
    b'{"labels":[' + b"null," * 6_000_000 + b"null]}",
    b'{"labels":[' + b"{}," * 2_000_000 + b"{}]}",
    b'{"labels":["' + b"x" * 31_000_000 + b'"]}',
    b"{" + b",".join(b'"k%d":0' % n for n in range(1_000_000)) + b"}",
    b"[" * 31_000_000,
]


@pytest.fixture
def wide(start: Any) -> Iterator[Client]:
    """A service with the limits that it has by default."""
    yield start(body=32_000_000)


@pytest.mark.parametrize("route", ["/v1/images", "/v1/edit"])
def test_millions_of_anything_stop_nobody(wide: Client, route: str) -> None:
    """/health is answered meanwhile, and what Python allocates stays small."""
    slowest, done = 0.0, threading.Event()

    def ask_for_health() -> None:
        nonlocal slowest
        while not done.is_set():
            began = time.perf_counter()
            assert wide.get("/health").status == 200
            slowest = max(slowest, time.perf_counter() - began)

    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    asking = threading.Thread(target=ask_for_health)
    asking.start()
    try:
        for data in MILLIONS:
            reply = wide.ask("POST", route, data)
            assert reply.status in (400, 413) and len(reply.error) < 300
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        done.set()
        asking.join()
    assert most - before < 10e6  # the body itself lies in pages of its own
    assert slowest < 5  # of a machine that is busy with other tests; tried by hand: 0.15 s


def test_a_large_picture_is_read(wide: Client) -> None:
    body = {"image": picture(PHOTO), "box": [0, 0, 40, 90], "seed": 2}
    assert wide.post("/v1/edit", body).status == 200
    padded = json.dumps(body).replace("/", "\\/")
    assert wide.ask("POST", "/v1/edit", padded.encode()).status == 200


NAMES = tuple(f"class {n}, long name of number {n} (thing)" for n in range(1000))


@pytest.mark.parametrize(
    "text", ["x" * 3_000_000, "(" * 500, "a" * 999, "class " * 100, ".*" * 300]
)
def test_labels_are_no_patterns_and_take_no_time(text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(LabelError, match="no class is called") as found:
        labels.resolve_labels([text], NAMES, 1000)
    assert len(str(found.value)) < 400
    assert time.perf_counter() - began < 5


def test_words_are_found_as_a_pattern_would_find_them() -> None:
    chance = random.Random(3)
    for _ in range(3000):
        text, words = ("".join(chance.choices("ab_ (-é", k=n)) for n in (12, chance.randint(1, 3)))
        expected = re.search(rf"\b{re.escape(words)}\b", text) is not None
        assert labels._has_words(text, words) == expected, (text, words)


def test_names_are_found_and_hinted_at() -> None:
    names = ("giant panda, panda", "crane (bird)", "crane (machine)", "T-shirt", "C++", "pan_a")
    hints = {"giant": names[0], "bird": names[1], "shirt": "T-shirt", "c+": "C++"}
    for text, hint in hints.items():
        with pytest.raises(LabelError) as found:
            labels.resolve_labels([text], names, 6)
        assert f"did you mean {hint}" in str(found.value), text
    assert labels.resolve_labels(["c++", "panda", "pan a"], names, 6) == [4, 0, 5]
    with pytest.raises(LabelError, match=r"several classes, give the number: 1 .*, 2 "):
        labels.resolve_labels(["crane"], names, 6)
