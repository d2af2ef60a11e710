"""Labels by name and by number."""

from __future__ import annotations

import numpy as np
import pytest

from var_deploy.errors import LabelError
from var_deploy.labels import resolve_labels

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


def test_a_model_without_names_takes_numbers_only() -> None:
    assert resolve_labels("999", (), 1000) == [999]
    with pytest.raises(LabelError, match="numbers 0 to 999"):
        resolve_labels("star", (), 1000)


def test_a_model_without_classes_takes_no_labels() -> None:
    with pytest.raises(LabelError, match="no classes"):
        resolve_labels("0", (), 0)
