"""Searching classes, labels that a shell completes, files of class names."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from var_deploy.errors import UsageError
from var_deploy.labels import ClassNames, imagenet, label_words, resolve_labels, search_classes
from var_deploy.labels.class_names import read_class_names
from var_deploy.labels.synonyms import all_classes

IMAGENET = all_classes(imagenet.CLASS_NAMES, 1000)


@pytest.mark.parametrize(
    ("word", "first", "others"),
    [
        ("248", 248, ()),
        ("husky", 248, (250,)),  # a synonym of 248; "Siberian husky" has the word
        ("HUSKIES", None, ()),
        ("toilet  Paper", 999, ()),
        ("alaskan_malamute", 249, ()),
        ("usk", 102, (248, 250)),  # parts of words
        ("", None, ()),
    ],
)
def test_a_search_gives_the_best_first(
    word: str, first: int | None, others: tuple[int, ...]
) -> None:
    found = [each.number for each in search_classes(word, IMAGENET)]
    if word == "usk":
        assert set(others) <= set(found), "parts of words"
    elif first is None:
        assert word == "" or found == []
    else:
        assert found[0] == first and set(others) <= set(found[1:])


def test_classes_without_names_are_found_by_number() -> None:
    nameless = all_classes((), 12)
    assert nameless[:1] == [ClassNames(number=0, name="")]
    assert [each.number for each in search_classes("1", nameless)] == [1]


def test_completed_labels_mean_their_class_and_need_no_quotes() -> None:
    names = (*imagenet.CLASS_NAMES, "crane", "7", "tench, Tinca tinca")
    for n, (word, name) in enumerate(label_words(names, len(names))):
        assert resolve_labels(word, names, len(names)) == [n], name
        assert shlex.split(word) == [word] and "," not in word and not word.startswith("-")
    assert dict(label_words(imagenet.CLASS_NAMES, 1000))["siberian_husky"] == "Siberian husky"
    assert label_words((), 2) == [("0", ""), ("1", "")]


def test_class_names_by_line_and_as_json(tmp_path: Path) -> None:
    path = tmp_path / "names"
    for text in ("cat\ndog, hound\n", "\ufeffcat\r\ndog, hound", ' ["cat", "dog, hound"]\n'):
        path.write_bytes(text.encode())
        assert read_class_names(path) == ("cat", "dog, hound")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"cat\n\ndog\n", "class 1 has no name"),
        (b'["cat", 3]', "class 1 has no name, found 3"),
        (b'["cat"', "not a JSON list"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"", "holds no names"),
        (json.dumps(["a\nb"]).encode(), "class 0 is not one line"),
        (b"x" * 1001, "class 0 is not one line of at most 1000"),
        (None, "does not exist"),
    ],
)
def test_class_names_that_are_none(tmp_path: Path, data: bytes | None, part: str) -> None:
    path = tmp_path / "names.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=part) as caught:
        read_class_names(path)
    assert "\n" not in str(caught.value)
