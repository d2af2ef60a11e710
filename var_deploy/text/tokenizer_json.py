"""Checks a tokenizer.json of T5's form before the library `tokenizers` reads it.

The file may come from a stranger. The library takes many kinds of tokenizers, among them regular
expressions that take exponential time and tables that make a gigabyte out of a kilobyte. Only the
parts that T5's tokenizers consist of pass here, each within bounds; every other part is refused by
name.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from var_deploy.bundle.json_values import DamagedError, Value, parse_json, shown
from var_deploy.errors import BundleError

MAX_BYTES = 32 << 20  # flan-t5's file has 2.4 MB, that of a vocabulary of 250 000 pieces has 16
MAX_PIECES = 1 << 20
MAX_PIECE = 256  # characters of a piece or of a special token
MAX_ADDED = 10_000
MAX_REPLACEMENT = 64  # bytes that one character may become; Unicode's longest (U+FDFA) is 33
MAX_SCORE = 1e9
MAX_NESTED = 8  # steps of a normalizer or pre-tokenizer

_PARTS = (
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"),
    *("post_processor", "decoder", "model"),
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SPACES = " {2,}"  # the one regular expression that converters of SentencePiece models write


@dataclass(frozen=True, kw_only=True)
class CheckedTokenizer:
    """A tokenizer that passed.

    Attributes:
        json: for `Tokenizer.from_str`.
        unknown: id of the token that stands for what the vocabulary lacks, or None.
    """

    json: str
    unknown: int | None


def check_tokenizer_json(data: bytes) -> CheckedTokenizer:
    """Return the checked tokenizer.

    Parts that are not used here (truncation, padding, decoder) are left out, so exactly what was
    checked is what the library reads. Raises BundleError, one line.
    """
    if len(data) > MAX_BYTES:
        raise BundleError(f"tokenizer.json has {len(data)} bytes, at most {MAX_BYTES} are expected")
    try:
        checked = _tokenizer(Value(parse_json(data)))
    except DamagedError as error:
        raise BundleError(f"tokenizer.json is not a T5 tokenizer: {error}") from None
    except ValueError as error:
        raise BundleError(f"tokenizer.json is not JSON: {error}") from None
    return CheckedTokenizer(
        json=json.dumps(checked, ensure_ascii=False), unknown=checked["model"]["unk_id"]
    )


def _tokenizer(data: Value) -> dict[str, Any]:
    data.only(*_PARTS)
    steps = {
        "normalizer": (_normalizer, "normalizers"),
        "pre_tokenizer": (_pre_tokenizer, "pretokenizers"),
    }
    checked: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    checked["added_tokens"] = _added_tokens(data.member("added_tokens"))
    for name, (check, inner) in steps.items():
        part = data.member(name)
        checked[name] = None if part.raw is None else _sequence(part, inner, check)
    checked["post_processor"] = _post_processor(data.member("post_processor"))
    checked["decoder"] = None
    checked["model"] = _model(data.member("model"))
    return checked


def _added_tokens(data: Value) -> list[dict[str, Any]]:
    tokens = []
    for given in data.items(MAX_ADDED):
        given.only("id", "content", *_FLAGS)
        token: dict[str, Any] = {
            "id": given.member("id").whole(0, MAX_PIECES),
            "content": _short(given.member("content")),
        }
        tokens.append(token | {flag: given.member(flag).flag() for flag in _FLAGS})
    return tokens


def _sequence(data: Value, inner: str, check: Callable[[Value], dict[str, Any]]) -> dict[str, Any]:
    """Check a step, or a sequence of steps in the member `inner`."""
    if data.member("type").raw != "Sequence":
        return check(data)
    data.only("type", inner)
    steps = [check(step) for step in data.member(inner).items(MAX_NESTED)]
    if sum(step["type"] == "Precompiled" for step in steps) > 1:  # each could lengthen the text
        raise data.refuse("one map of characters")
    return {"type": "Sequence", inner: steps}


def _normalizer(data: Value) -> dict[str, Any]:
    kind = data.member("type").one_of("Precompiled", "Strip", "Replace")
    if kind == "Precompiled":
        data.only("type", "precompiled_charsmap")
        _check_character_map(data.member("precompiled_charsmap"))
    elif kind == "Strip":
        data.only("type", "strip_left", "strip_right")
        for side in ("strip_left", "strip_right"):
            data.member(side).flag()
    else:
        data.only("type", "pattern", "content")
        pattern = data.member("pattern").only("String", "Regex")
        if len(pattern.members()) != 1:
            raise pattern.refuse("one String or Regex")
        if "Regex" in pattern.members():
            pattern.member("Regex").one_of(_SPACES)
        elif not _short(pattern.member("String")):
            raise pattern.refuse("text that is not empty")
        # two spaces or more become at most two characters
        longest = 2 if "Regex" in pattern.members() else len(pattern.member("String").text())
        if len(_short(data.member("content"))) > longest:
            raise data.member("content").refuse("text that is not longer than what it replaces")
    return dict(data.plain())


def _check_character_map(data: Value) -> None:
    """Check SentencePiece's map of characters: a trie, then the strings that it points to."""
    try:
        blob = base64.b64decode(data.words(), validate=True)
    except (binascii.Error, ValueError):
        raise data.refuse("base64") from None
    trie = int.from_bytes(blob[:4], "little")
    strings = blob[4 + trie :]
    if len(blob) < 4 or trie % 4 or not strings:
        raise data.refuse("a map of characters: a trie and strings")
    longest = max(map(len, strings.split(b"\0")))
    if longest > MAX_REPLACEMENT:
        raise DamagedError(
            f"{data.place} turns a character into {longest} bytes, at most {MAX_REPLACEMENT} are "
            "expected"
        )


def _pre_tokenizer(data: Value) -> dict[str, Any]:
    kind = data.member("type").one_of("WhitespaceSplit", "Metaspace")
    if kind == "WhitespaceSplit":
        data.only("type")
    else:
        data.only("type", "replacement", "prepend_scheme", "add_prefix_space", "split", "str_rep")
        members = data.members()
        if len(_short(data.member("replacement"))) != 1:
            raise data.member("replacement").refuse("one character")
        if "prepend_scheme" in members:
            members["prepend_scheme"].one_of("always", "first", "never")
        for name in {"add_prefix_space", "split"} & members.keys():
            members[name].flag()
        if "str_rep" in members:
            _short(members["str_rep"])
    return dict(data.plain())


def _post_processor(data: Value) -> dict[str, Any]:
    """Check that the text is followed by `</s>`, and that nothing else is added to it."""
    data.only("type", "single", "pair", "special_tokens")
    data.member("type").one_of("TemplateProcessing")
    single = data.member("single")
    expected = "the text, then </s>"
    parts = single.items(MAX_NESTED)
    if len(parts) != 2 or list(parts[0].members()) != ["Sequence"]:
        raise single.refuse(expected)
    if parts[0].member("Sequence").member("id").raw != "A":
        raise single.refuse(expected)
    if list(parts[1].members()) != ["SpecialToken"]:
        raise single.refuse(expected)
    if parts[1].member("SpecialToken").member("id").raw != "</s>":
        raise single.refuse(expected)
    ends = data.member("special_tokens").member("</s>").member("ids").items(MAX_NESTED)
    if len(ends) != 1:
        raise data.member("special_tokens").refuse("one id for </s>")
    end = ends[0].whole(0, MAX_PIECES)
    template = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
    special = {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}}
    second = [{"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": template,
        "pair": [*template, *second],
        "special_tokens": special,
    }


def _model(data: Value) -> dict[str, Any]:
    data.only("type", "unk_id", "vocab", "byte_fallback")
    data.member("type").one_of("Unigram")
    vocab = data.member("vocab")
    for number, piece in enumerate(vocab.raw if vocab.items(MAX_PIECES) else ()):
        text, score = (
            piece if isinstance(piece, list) and len(piece) == 2 else (None, 2 * MAX_SCORE)
        )
        good = isinstance(text, str) and len(text) <= MAX_PIECE
        if not good or type(score) not in (int, float) or not -MAX_SCORE <= score <= MAX_SCORE:
            raise DamagedError(
                f"{vocab.place}[{number}] is {shown(piece)}, expected a piece of at most "
                f"{MAX_PIECE} characters and its score"
            )
    unknown = data.member("unk_id")
    if unknown.raw is not None:
        unknown.whole(0, len(vocab.raw) - 1)
    if "byte_fallback" in data.members():
        data.member("byte_fallback").flag()
    return dict(data.plain())


def _short(data: Value) -> str:
    text = data.text()
    if len(text) > MAX_PIECE:
        raise data.refuse(f"at most {MAX_PIECE} characters")
    return text
