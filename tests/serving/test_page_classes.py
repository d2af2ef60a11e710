"""The page's list of classes where there are a thousand: search, keyboard, and what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving.browser import Visit, accessibility_faults, finished, focused, query
from serving.client import Client, running

from var_deploy.labels.imagenet import CLASS_NAMES
from var_deploy.pipeline import Pipeline


@pytest.fixture(scope="module")
def many(
    tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]
) -> Iterator[Client]:
    """A service with the classes of ImageNet."""
    pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.serving.app import create_app

    out: Path = tmp_path_factory.mktemp("many") / "bundle"
    model = dataclasses.replace(small_model(classes=1000), labels=CLASS_NAMES)
    export_bundle(model, out, ExportOptions(layout="shared"))
    with Pipeline.load(out, threads=1) as pipeline, running(create_app(pipeline)) as client:
        yield client


def options(page: Any) -> list[str]:
    """Names of the classes that the list shows."""
    found: list[str] = page.locator("#class-list [role=option] > span").all_inner_texts()
    return found


def chosen(page: Any) -> list[str]:
    found: list[str] = page.locator("#chosen li > span").all_inner_texts()
    return found


def active(page: Any) -> str:
    """Name of the option that `aria-activedescendant` points to."""
    found: str = page.evaluate(
        """() => {
          const id = document.activeElement.getAttribute("aria-activedescendant");
          return id ? document.querySelector(`#${id} > span`).textContent : "";
        }"""
    )
    return found


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("GOLDFISH", ["goldfish"]),
        ("207", ["golden retriever"]),
        ("toilet paper", ["toilet tissue"]),  # a synonym
        ("panda", ["lesser panda", "giant panda"]),  # a word of the name
        ("husky", ["Eskimo dog", "Siberian husky"]),  # all of a synonym, a word of the name
        ("no", ["no class"]),
    ],
)
def test_classes_are_found(visit: Visit, many: Client, text: str, first: list[str]) -> None:
    page = visit(to=many)
    page.fill("#class-text", text)
    assert options(page)[: len(first)] == first


def test_the_list_by_keyboard(visit: Visit, many: Client) -> None:
    page = visit("?seed=1", to=many)
    finished(page)
    assert chosen(page) == ["no class"], "as the link says: a choice that is seen"
    page.focus("#class-text")
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#class-text", "aria-expanded") == "true"
    assert (len(options(page)), active(page)) == (1001, "no class")
    for key, name in (
        ("ArrowDown", "tench"),
        ("PageDown", "hen"),
        ("End", "toilet tissue"),
        ("ArrowDown", "no class"),
        ("ArrowUp", "toilet tissue"),
        ("Home", "no class"),
        ("ArrowDown", "tench"),
    ):
        page.keyboard.press(key)
        assert active(page) == name
        seen = page.evaluate(
            """() => {
              const box = (element) => element.getBoundingClientRect();
              const list = box(document.querySelector("#class-list"));
              const option = box(document.querySelector(".active"));
              return option.top >= list.top - 1 && option.bottom <= list.bottom + 1;
            }"""
        )
        assert seen, f"{name} is scrolled away"
    page.keyboard.press("Escape")
    assert page.get_attribute("#class-text", "aria-expanded") == "false"
    assert chosen(page) == ["no class"]
    page.keyboard.type("hamm")
    assert active(page) == "hammerhead"
    page.keyboard.press("ArrowDown")
    assert active(page) == "hammer"
    page.keyboard.press("Enter")
    assert chosen(page) == ["hammer"] and page.input_value("#class-text") == ""
    assert page.is_hidden("#class-popup") and focused(page) == "class-text"
    page.fill("#seed", "4")
    page.focus("#class-text")
    with page.expect_request("**/v1/images/stream") as asked:
        page.keyboard.press("Enter")
    assert asked.value.post_data_json == {"labels": ["hammer"], "count": 1, "seed": [4]}
    finished(page)
    assert query(page) == "label=hammer&seed=4"


def test_several_classes_of_a_list(visit: Visit, many: Client) -> None:
    page = visit("?label=hen&seed=1", to=many)
    finished(page)
    page.check("#several")
    for text in ("crane (bird)", "517", "none"):
        page.fill("#class-text", text)
        page.keyboard.press("Enter")
    assert chosen(page) == ["hen", "crane (bird)", "crane (machine)", "no class"]
    assert page.is_visible("#class-popup"), "the next one can be chosen at once"
    page.keyboard.press("Escape")
    page.keyboard.press("Backspace")
    page.click("[aria-label='Remove hen']")
    assert chosen(page) == ["crane (bird)", "crane (machine)"]
    assert page.input_value("#count") == "2" and focused(page) == "class-text"
    page.uncheck("#several")
    assert chosen(page) == ["crane (bird)"] and page.input_value("#count") == "1"


def test_what_is_typed_and_not_taken(visit: Visit, many: Client) -> None:
    page = visit("?label=hen&seed=1", to=many)
    finished(page)
    page.fill("#class-text", "unicorn")
    assert page.inner_text("#class-found") == "No class is called that."
    page.click("#generate")
    assert page.inner_text("#notice-text") == (
        "No class is called “unicorn”. Choose one from the list."
    )
    assert focused(page) == "class-text"
    page.fill("#class-text", "Tinca_tinca")
    page.keyboard.press("Tab")
    assert chosen(page) == ["tench"], "it is the full name of one"


def test_a_link_may_name_a_synonym_or_a_number(visit: Visit, many: Client) -> None:
    page = visit("?label=bathroom+tissue&label=1&seed=2&count=2", to=many)
    finished(page)
    assert chosen(page) == ["toilet tissue", "goldfish"]
    assert query(page) == "label=toilet+tissue&label=goldfish&seed=2&count=2"


def test_a_link_that_may_mean_two_classes_says_which(visit: Visit, many: Client) -> None:
    page = visit("?label=crane&seed=2", to=many)
    assert page.inner_text("#notice-text") == (
        "The link's “crane” may be crane (bird) (134) or crane (machine) (517). Choose one."
    )


def test_an_edit_has_a_choice_of_its_own(visit: Visit, many: Client) -> None:
    page = visit("?label=hen&seed=1", to=many)
    finished(page)
    page.click("#edit-this")
    page.wait_for_selector("#mask-editor", state="visible")
    assert chosen(page) == ["whatever fits"] and page.is_hidden("#several-box")
    page.fill("#class-text", "whatever")
    assert options(page) == ["whatever fits"]
    page.keyboard.press("Escape")
    page.get_by_text("Generate", exact=True).first.click()
    assert chosen(page) == ["hen"]


def test_classes_without_names_are_numbers(visit: Visit, many: Client) -> None:
    def answer(route: Any) -> None:
        model = route.fetch().json()
        model.update(labels=None, synonyms=None)
        model["defaults"]["cfg"] = [0, 1, 2]
        route.fulfill(json=model)

    page = visit(to=many)
    page.route("**/v1/model", answer)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.get_attribute("#class-text", "placeholder") == "A number from 0 to 999"
    assert page.input_value("#cfg-number") == "", "a value for each scale"
    page.fill("#class-text", "12")
    assert options(page)[:2] == ["class 12", "class 120"]
    page.keyboard.press("Enter")
    page.fill("#seed", "4")
    with page.expect_request("**/v1/images/stream") as asked:
        page.click("#generate")
    assert asked.value.post_data_json == {"labels": [12], "count": 1, "seed": [4]}
    finished(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong_with_the_list(visit: Visit, many: Client, scheme: str) -> None:
    page = visit("?label=hen&label=tench&seed=1&count=2", to=many, color_scheme=scheme)
    finished(page)
    page.fill("#class-text", "dog")
    page.keyboard.press("ArrowDown")
    assert not accessibility_faults(page)
    page.fill("#class-text", "unicorn")
    assert not accessibility_faults(page)


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (1366, 620), (390, 760)])
def test_fill_is_always_visible(visit: Visit, many: Client, width: int, height: int) -> None:
    page = visit("?label=hen&seed=1", to=many, viewport={"width": width, "height": height})
    finished(page)
    page.click("#edit-this")
    page.wait_for_selector("#mask-editor", state="visible")
    page.click("#settings summary")
    page.evaluate("scrollTo(0, 0)")
    frame = page.locator("#generate").bounding_box()
    assert page.inner_text("#generate") == "Fill"
    assert frame["y"] >= 0 and frame["y"] + frame["height"] <= height
