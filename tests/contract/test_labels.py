"""Labels by name and by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from var_deploy.errors import LabelError
from var_deploy.labels import imagenet, resolve_labels, resolve_labels_or_none

NAMES = ("star", "heart", "house", "tree", "Boat")
IMAGENET = ("tench, Tinca tinca", "crane", "crane, machine", "ox")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("star,3", [0, 3]),
        ("  STAR , boat,", [0, 4]),
        (["tree", 0, "2", np.int64(4)], [3, 0, 2, 4]),
        (2, [2]),
        ("0,0,0", [0, 0, 0]),
    ],
)
def test_names_and_numbers(given: object, expected: list[int]) -> None:
    assert resolve_labels(given, NAMES, len(NAMES)) == expected  # type: ignore[arg-type]


def test_names_with_commas() -> None:
    assert resolve_labels("tench, tinca tinca", IMAGENET, 4) == [0]
    assert resolve_labels(["Tench, Tinca tinca", "ox"], IMAGENET, 4) == [0, 3]
    assert resolve_labels("tench,ox", IMAGENET, 4) == [0, 3]
    assert resolve_labels("crane", IMAGENET, 4) == [1], "a whole name wins over a synonym"


def test_an_ambiguous_name_lists_its_numbers() -> None:
    with pytest.raises(LabelError, match=r"1 \(crane\), 2 \(crane\)"):
        resolve_labels("crane", ("ox", "crane", "crane"), 3)


def test_a_note_tells_two_names_apart() -> None:
    names = ("crane (bird)", "ox", "crane (machine)", "saw (tool)")
    assert resolve_labels("Crane (machine), saw,OX", names, 4) == [2, 3, 1]
    with pytest.raises(LabelError, match=r"give the number: 0 \(crane \(bird\)\), 2 \(crane"):
        resolve_labels("crane", names, 4)


def test_imagenet_has_1000_names_that_differ() -> None:
    names = imagenet.CLASS_NAMES
    assert len(names) == len({name.casefold() for name in names}) == 1000
    assert all(name == " ".join(name.split()) and name and "," not in name for name in names)
    assert max(map(len, names)) <= 30
    assert [resolve_labels([name], names, 1000)[0] for name in names] == list(range(1000))


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (0, "tench"),
        (1, "goldfish"),
        (9, "ostrich"),
        (22, "bald eagle"),
        (107, "jellyfish"),
        (130, "flamingo"),
        (134, "crane (bird)"),
        (207, "golden retriever"),
        (254, "pug"),
        (263, "Pembroke Welsh corgi"),
        (281, "tabby"),
        (291, "lion"),
        (340, "zebra"),
        (388, "giant panda"),
        (417, "balloon"),
        (437, "beacon"),
        (474, "cardigan"),
        (497, "church"),
        (517, "crane (machine)"),
        (569, "garbage truck"),
        (621, "lawn mower"),
        (639, "maillot (tank suit)"),
        (701, "parachute"),
        (779, "school bus"),
        (817, "sports car"),
        (849, "teapot"),
        (933, "cheeseburger"),
        (954, "banana"),
        (963, "pizza"),
        (980, "volcano"),
        (985, "daisy"),
        (999, "toilet tissue"),
    ],
)
def test_imagenet_classes_that_everybody_knows(label: int, name: str) -> None:
    assert imagenet.CLASS_NAMES[label] == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("panda", "did you mean lesser panda or giant panda?"),
        ("corgi", "did you mean Pembroke Welsh corgi or Cardigan Welsh corgi?"),
        ("golden_retreiver", "did you mean golden retriever"),
        ("cheesburger", "did you mean cheeseburger"),
        ("crane", "134 (crane (bird)), 517 (crane (machine))"),
        ("maillot", "638 (maillot (tights)), 639 (maillot (tank suit))"),
        ("xyzzy", "labels are the numbers 0 to 999 and the names that"),
        ("a" * 5000, "no class is called '" + "a" * 60 + "…'"),
    ],
)
def test_imagenet_names_that_miss(given: str, message: str) -> None:
    with pytest.raises(LabelError) as error:
        resolve_labels(given, imagenet.CLASS_NAMES, 1000)
    assert message in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sta", "did you mean star"),
        ("hose", "did you mean house"),
        ("zebra", "star, heart, house, tree, Boat"),
        ("5", "label 5 is out of range; the model has 0 to 4"),
        ("-1", "label -1 is out of range"),
        ("9" * 30, "no class is called"),
        ("1.5", "no class is called '1.5'"),
        ("", "no label given"),
        (" , ", "no label given"),
        ([""], "no class is called ''"),
        ([], "no label given"),
        ([True], "found True"),
        ([1.0], "found 1.0"),
        (1.5, "found 1.5"),
    ],
)
def test_bad_labels_say_what_there_is(given: object, message: str) -> None:
    with pytest.raises(LabelError) as error:
        resolve_labels(given, NAMES, len(NAMES))  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_released_models_have_these_names() -> None:
    pytest.importorskip("torch")
    from var_deploy.export.checkpoint.presets import PRESETS, RELEASED_REPO

    for preset in PRESETS.values():
        assert len(preset.labels) == preset.spec.transformer.classes
        assert (preset.labels == imagenet.CLASS_NAMES) == (preset.repo == RELEASED_REPO)


def test_a_model_without_names_takes_numbers_only() -> None:
    assert resolve_labels("999", (), 1000) == [999]
    with pytest.raises(LabelError, match="numbers 0 to 999"):
        resolve_labels("star", (), 1000)


def test_a_model_without_classes_takes_no_labels() -> None:
    with pytest.raises(LabelError, match="no classes"):
        resolve_labels("0", (), 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("none", [None]),
        ("NONE, none", [None, None]),
        ("star,none,1", [0, None, 1]),
        (["none"], [None]),
        (["b", "none"], [1, None]),
    ],
)
def test_none_is_no_class(given: Any, expected: list[int | None]) -> None:
    assert resolve_labels_or_none(given, ["star", "b"], 2) == expected


def test_a_class_that_is_called_none_is_meant() -> None:
    for name in ("None", "none, nothing", "none (of these)"):
        assert resolve_labels_or_none("none,0", [name, "b"], 2) == [0, 0]


def test_none_leaves_the_other_labels_to_be_checked() -> None:
    with pytest.raises(LabelError, match="no class is called 'x'"):
        resolve_labels_or_none("none,x", ["star"], 1)
    with pytest.raises(LabelError, match="no label given"):
        resolve_labels_or_none(" ", ["star"], 1)
    assert resolve_labels_or_none("none", [], 0) == [None]
    with pytest.raises(LabelError, match="has no classes"):
        resolve_labels_or_none("none,3", [], 0)
