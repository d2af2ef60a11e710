"""Other names of classes."""

from __future__ import annotations

import pytest

from var_deploy.labels.imagenet import CLASS_NAMES
from var_deploy.labels.synonyms import class_synonyms


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("tench", ("Tinca tinca",)),
        ("great white shark", ("white shark", "man-eater", "man-eating shark")),
        ("sports car", ("sport car",)),
        ("toilet tissue", ("toilet paper", "bathroom tissue")),
    ],
)
def test_classes_of_imagenet_have_their_wordnet_names(name: str, others: tuple[str, ...]) -> None:
    found = class_synonyms(CLASS_NAMES)
    assert len(found) == 1000
    assert set(others) <= set(found[CLASS_NAMES.index(name)])


def test_no_class_is_its_own_synonym() -> None:
    for name, others in zip(CLASS_NAMES, class_synonyms(CLASS_NAMES), strict=True):
        folded = [other.casefold() for other in others]
        assert name.casefold() not in folded and len(set(folded)) == len(folded)
        assert all(others)


def test_names_may_list_synonyms_themselves() -> None:
    assert class_synonyms(["tench, Tinca tinca", "hen"]) == [("Tinca tinca",), ()]
    assert class_synonyms([]) == []
