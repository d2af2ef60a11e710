"""Prompts to tokens, against encodings of the library that the published sampler uses."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import t5_case
from var_deploy.errors import BackendError, BundleError, UsageError, VarDeployError
from var_deploy.host.installation import pip_install
from var_deploy.text import tokenizer_json
from var_deploy.text.prompt_tokenizer import MAX_CHARACTERS, PromptTokenizer

FOLDER = Path(__file__).parents[1] / "golden-infinity" / "t5"
FILE = (FOLDER / "tokenizer.json").read_bytes()
CASES = json.loads((FOLDER / "encodings.json").read_text())
VOCAB = 288  # rows of the golden T5's embedding


@pytest.fixture(scope="module")
def tokenize() -> PromptTokenizer:
    return PromptTokenizer(FILE, 600, vocab_size=VOCAB)


@pytest.mark.parametrize("number", range(len(CASES["encodings"])))
def test_the_published_encodings(number: int, tokenize: PromptTokenizer) -> None:
    case = CASES["encodings"][number]
    found = tokenize(case["text"])
    assert found.ids.dtype == np.int64 and found.mask.dtype == np.bool_
    assert found.ids[found.mask].tolist() == case["ids"]
    assert not found.ids[~found.mask].any()
    assert found.length == found.tokens == len(case["ids"])
    assert found.truncation == ""


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red fo", ()),
        ("a red fox, zeppe", ("fox",)),
        ("你好! 🦊 fox and fox", ("你好", "🦊", "fox")),
        ("fo🦊", ("🦊",)),
        ("", ()),
    ],
)
def test_words_that_the_vocabulary_lacks(prompt: str, unknown: tuple[str, ...]) -> None:
    """The golden tokenizer has no piece for an x alone."""
    assert PromptTokenizer(t5_case.TOKENIZER_JSON, 32)(prompt).unknown == unknown


def test_a_vocabulary_without_an_unknown_token_knows_everything() -> None:
    data = json.loads(t5_case.TOKENIZER_JSON)
    data["model"]["unk_id"] = None
    tokenizer = PromptTokenizer(json.dumps(data).encode(), 32)
    assert tokenizer("a red fo").unknown == ()


def test_truncation_keeps_the_end_token() -> None:
    case = CASES["truncated"]
    found = PromptTokenizer(FILE, case["max_length"])(case["text"])
    assert found.ids.tolist() == case["ids"] and found.ids[-1] == 1
    assert found.mask.all() and found.length == case["max_length"]
    assert found.tokens == 563
    assert found.truncation == (
        "the prompt has 563 tokens, this bundle takes 96: it ends at '… 1926\"; a quiet'"
    )


@pytest.mark.parametrize("length", [1, 2, 7, 18, 19])
def test_any_length(length: int, tokenize: PromptTokenizer) -> None:
    text = "A tiny robot floats above the river at dawn"
    whole = tokenize(text)
    found = PromptTokenizer(FILE, length)(text)
    kept = min(length, 18)
    assert found.length == kept and found.tokens == 18
    assert found.ids[:kept].tolist() == [*whole.ids[: kept - 1].tolist(), 1]
    assert bool(found.truncation) == (length < 18)


def test_an_empty_prompt_is_one_token(tokenize: PromptTokenizer) -> None:
    for text in ("", "   ", "\n\t"):
        found = tokenize(text)
        assert (found.length, found.ids[0], found.ids[1]) == (1, 1, 0)


def test_text_that_spells_a_special_token_becomes_it(tokenize: PromptTokenizer) -> None:
    """As in the published path; it ends nothing."""
    ids = tokenize("a </s> b <extra_id_9> <pad>c").ids.tolist()
    ends = [i for i, token in enumerate(ids) if token == 1]
    assert len(ends) == 2 and 264 in ids[: ends[1]]


@pytest.mark.parametrize(
    "text",
    ["\x00\x07\x1b[31mred", "東京タワー 🌉", "مرحبا", "\U0010ffff", "e\u0301" * 300, "\u202eabc"],
    ids=ascii,
)
def test_any_text_that_utf8_holds(text: str, tokenize: PromptTokenizer) -> None:
    found = tokenize(text)
    assert found.ids[found.length - 1] == 1 and found.ids.max() < VOCAB


def test_ten_thousand_characters(tokenize: PromptTokenizer) -> None:
    for text in ("a" * 10_000, "river " * 1667, "\x1b[2J" * 2500, "</s>" * 2500):
        found = tokenize(text)
        assert found.length == 600 < found.tokens
        assert found.truncation.isprintable(), "control characters are escaped"
        assert len(found.truncation) < 200


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("x" * (MAX_CHARACTERS + 1), "has 20001 characters, at most 20000 are accepted"),
        ("ab\ud83d", "character 2 of the prompt is '\\ud83d', half a surrogate pair"),
        (b"text", "a prompt must be text, found bytes"),
        (None, "a prompt must be text, found NoneType"),
    ],
    ids=["long", "surrogate", "bytes", "none"],
)
def test_refused_prompts(prompt: Any, said: str, tokenize: PromptTokenizer) -> None:
    with pytest.raises(UsageError, match=said.replace("\\", "\\\\")):
        tokenize(prompt)


@pytest.mark.parametrize("length", [0, -1, 4097, True, 2.0])
def test_a_length_out_of_range(length: Any) -> None:
    with pytest.raises(UsageError, match="text length must be from 1 to 4096"):
        PromptTokenizer(FILE, length)


# files that may come from a stranger


def changed(change: Callable[[Any], object]) -> bytes:
    data = copy.deepcopy(json.loads(FILE))
    change(data)
    return json.dumps(data).encode()


def put(*path: Any, value: Any) -> Callable[[Any], object]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def character_map(strings: bytes) -> str:
    blob = base64.b64decode(json.loads(FILE)["normalizer"]["precompiled_charsmap"])
    trie = int.from_bytes(blob[:4], "little")
    return base64.b64encode(blob[: 4 + trie] + strings).decode()


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}
LONGER = {"type": "Replace", "pattern": {"String": "aa"}, "content": "aaa"}
END = [{"Sequence": {"id": "A", "type_id": 0}}]
WITHOUT_END = (
    put("added_tokens", 1, "content", value="</x>"),
    put("model", "vocab", 1, 0, value="</x>"),
)


def twice(data: Any) -> Any:
    return {"type": "Sequence", "normalizers": [data["normalizer"]] * 2}


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "is not JSON"),
    "a list": (b"[]", "it is \\[\\], expected an object"),
    "half": (FILE[:5000], "is not JSON"),
    "deep": (b"[" * 100_000, "is not JSON: nested too deeply"),
    "huge": (b" " * (tokenizer_json.MAX_BYTES + 1), "has 33554433 bytes, at most 33554432"),
    "twice": (b'{"version": "1.0", "version": "1.0"}', "'version' is there twice"),
    "other model": (changed(put("model", "type", value="BPE")), "model.type is 'BPE'"),
    "other part": (changed(put("more", value=1)), "more is unknown"),
    "a slow pattern": (changed(put("pre_tokenizer", value=SPLIT)), "'Split', expected Whitespace"),
    "another": (changed(put("normalizer", value=REPLACE)), "Regex is '\\(a|a\\)\\*b'"),
    "no end": (changed(put("post_processor", "single", value=END)), "expected the text, then </s>"),
    "no template": (changed(put("post_processor", value=None)), "post_processor is None"),
    "other end": (
        changed(put("post_processor", "special_tokens", "</s>", "ids", value=[5])),
        "has no token </s>, which ends every prompt of T5",
    ),
    "no token": (
        changed(lambda data: [rename(data) for rename in WITHOUT_END]),
        "has no token </s>, which ends",
    ),
    "nan": (changed(put("model", "vocab", 5, 1, value=float("nan"))), "expected a piece of at mos"),
    "big score": (changed(put("model", "vocab", 5, 1, value=10**400)), "expected a piece of at m"),
    "long piece": (changed(put("model", "vocab", 5, 0, value="x" * 257)), "a piece of at most 256"),
    "unknown id": (changed(put("model", "unk_id", value=274)), "whole number from 0 to 273"),
    "no map": (changed(put("normalizer", "precompiled_charsmap", value="!")), "expected base64"),
    "short map": (
        changed(put("normalizer", "precompiled_charsmap", value="AAAA")),
        "expected a map of characters",
    ),
    "bomb": (
        changed(put("normalizer", "precompiled_charsmap", value=character_map(b"x" * 65))),
        "turns a character into 65 bytes",
    ),
    "two bombs": (
        changed(lambda data: put("normalizer", value=twice(data))(data)),
        "expected one map of characters",
    ),
    "longer text": (
        changed(put("normalizer", value=LONGER)),
        "normalizer.content is 'aaa', expected text that is not longer than what it replaces",
    ),
    "id": (changed(put("added_tokens", 0, "id", value=-1)), "added_tokens\\[0\\].id is -1"),
    "text": (b'"\\ud800"', "is not JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_none(name: str) -> None:
    data, said = BAD_FILES[name]
    with pytest.raises(BundleError, match=said) as caught:
        PromptTokenizer(data, 16)
    message = str(caught.value)
    assert message.startswith("tokenizer.json ") and message.isprintable()
    assert len(message) < 400


def test_ids_that_the_model_lacks() -> None:
    with pytest.raises(BundleError, match=r"gives '<extra_id_0>' the id 273, but .* only 270"):
        PromptTokenizer(FILE, 16, vocab_size=270)
    assert PromptTokenizer(FILE, 16, vocab_size=274)("a").length == 2


def test_damage_inside_the_map_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The library panics, which is not an Exception."""
    data = json.loads(FILE)
    blob = bytearray(base64.b64decode(data["normalizer"]["precompiled_charsmap"]))
    trie = int.from_bytes(blob[:4], "little")
    blob[4 : 4 + trie] = np.random.default_rng(0).bytes(trie)
    data["normalizer"]["precompiled_charsmap"] = base64.b64encode(bytes(blob)).decode()
    with pytest.raises(VarDeployError, match="not a T5 tokenizer that can be used"):
        PromptTokenizer(json.dumps(data).encode(), 16)("naïve ½ 東京")
    capfd.readouterr()


def test_forms_that_other_converters_write() -> None:
    """The chain of newer transformers, and a Metaspace of before `prepend_scheme`."""

    def chain(data: Any) -> None:
        steps = [
            data["normalizer"],
            {"type": "Strip", "strip_left": False, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        ]
        data["normalizer"] = {"type": "Sequence", "normalizers": steps}
        data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}

    text = "A tiny robot floats above the river at dawn"
    expected = PromptTokenizer(FILE, 32)(text)
    assert PromptTokenizer(changed(chain), 32)(text).ids.tolist() == expected.ids.tolist()


def test_what_a_file_asks_for_beside_the_tokens_is_left_out() -> None:
    """Truncation and padding of the file would hide what was cut off."""

    def ask(data: Any) -> None:
        data["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        data["padding"] = {
            "strategy": {"Fixed": 10},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }

    found = PromptTokenizer(changed(ask), 32)("A tiny robot floats above the river at dawn")
    assert found.tokens == 18


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BackendError) as caught:
        PromptTokenizer(FILE, 16)
    assert str(caught.value) == (
        f"tokenizers is not installed; run {pip_install('text', 'tokenizers')}"
    )


def test_the_library_is_loaded_at_first_use() -> None:
    code = (
        "import sys, var_deploy.text.prompt_tokenizer as p\n"
        "assert 'tokenizers' not in sys.modules\n"
        f"p.PromptTokenizer(open({str(FOLDER / 'tokenizer.json')!r}, 'rb').read(), 8)('a')\n"
        "assert 'tokenizers' in sys.modules\n"
        "assert not {'torch', 'onnx', 'huggingface_hub', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
