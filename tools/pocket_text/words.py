"""Writes pocket-text's tokenizer.json, and tokenizes with it.

The file has T5's form, with a token for each word of the grammar.

As in T5's own file the model is a Unigram of pieces that begin with `▁` (Kudo, arXiv 1804.10959),
`</s>` ends a text, and a map of characters comes first. Here that map makes A–Z small. A word that
is not in the vocabulary becomes `<unk>`, at its place in the text.
"""

from __future__ import annotations

import base64
import json
import string
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_deploy.text.prompt_tokenizer import PromptTokenizer

SPECIAL = ("<pad>", "</s>", "<unk>")
MARKS = (",", ".", "!", "?")
_FIRST, _LEAF = 256, 128  # offsets of the trie's root and of its nodes
_UNITS = 512


def tokenizer_json(words: tuple[str, ...]) -> bytes:
    """Return the file for a vocabulary of lower-case words. The same words give the same bytes."""
    # the specials' scores play no part; one score for all words, since none is made of others
    vocab: list[list[Any]] = [[token, 0.0] for token in SPECIAL]
    vocab += [[f"▁{word}", -5.0] for word in words]
    vocab += [[mark, -5.0] for mark in MARKS]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = SPECIAL.index("</s>")
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True} for i, token in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": _lower_case()},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": SPECIAL.index("<unk>"),
            "vocab": vocab,
            "byte_fallback": False,
        },
    }
    return (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode()


def vocab_size(words: tuple[str, ...]) -> int:
    """Return how many tokens the vocabulary has, the special ones included."""
    return len(SPECIAL) + len(words) + len(MARKS)


def tokenize(
    words: PromptTokenizer, texts: list[str], rng: np.random.Generator, unknown: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return ids [B, S] and lengths [B]; S is the length of the longest.

    In a share of the texts, `unknown`, one word is replaced by the token of unknown words.
    """
    found = [words(text) for text in texts]
    lengths = np.array([text.length for text in found])
    ids = np.stack([text.ids for text in found])[:, : lengths.max()]
    for row in np.flatnonzero(rng.random(len(texts)) < unknown):
        ids[row, rng.integers(max(lengths[row] - 1, 1))] = SPECIAL.index("<unk>")
    return torch.from_numpy(ids), torch.from_numpy(lengths)


def _lower_case() -> str:
    """Return SentencePiece's map of characters with A–Z → a–z alone, in base64.

    It is a double-array trie (Aoe, 1989) in the layout of Darts-clone, then the replacements, each
    ended by a zero byte. A unit holds its byte as label, the offset of its children from bit 10
    on, and in bit 8 whether a key ends here; the value of a key, its replacement's place, lies in
    the child of label 0.
    """
    units = [0] * _UNITS
    units[0] = _FIRST << 10
    texts = b""
    for letter in string.ascii_uppercase:
        node = _FIRST ^ ord(letter)
        units[node] = _LEAF << 10 | 1 << 8 | ord(letter)
        units[node ^ _LEAF] = 1 << 31 | len(texts)
        texts += letter.lower().encode() + b"\0"
    trie = struct.pack(f"<{_UNITS}I", *units)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + texts).decode()
