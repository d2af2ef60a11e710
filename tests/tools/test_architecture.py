"""docs/architecture.svg shows the imports of today."""

from __future__ import annotations

from tools.architecture import PICTURE, package_imports, picture, reduced, rows

DIAMOND = {"top": {"left", "right", "base"}, "left": {"base"}, "right": {"base"}, "base": set()}


def test_the_picture_is_current() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(package_imports()), (
        "run python -m tools.architecture"
    )


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    arrows = [("top", "left"), ("top", "right"), ("left", "base"), ("right", "base")]
    assert reduced(DIAMOND) == arrows
    assert rows(DIAMOND) == {"top": 2, "left": 1, "right": 1, "base": 0}


def test_packages_that_import_each_other_share_a_row() -> None:
    graph = {"a": {"b"}, "b": {"a", "c"}, "c": set[str]()}
    assert rows(graph) == {"a": 1, "b": 1, "c": 0}


def test_every_package_is_drawn_once() -> None:
    graph = package_imports()
    text = picture(graph)
    assert text.count("<text ") == len(graph) and "var_deploy (contract)" in text
