"""The page of a bundle that takes prompts, in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import text_case
from serving.browser import (
    Visit,
    accessibility_faults,
    file,
    finished,
    focused,
    pixels,
    query,
    shown,
)
from serving.client import Client

from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

HEIGHT, WIDTH = text_case.HEIGHT, text_case.WIDTH


@pytest.fixture(scope="module")
def pipe(text_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(text_bundle, threads=1) as pipeline:
        yield pipeline


def asked(service: Client, **body: Any) -> Any:
    return service.post("/v1/images", body).images()[0]


def ask(page: Any, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    finished(page)


def test_a_prompt_is_sent_with_enter_and_kept(visit: Visit, service: Client) -> None:
    page = visit(viewport={"width": 1280, "height": 800})
    assert page.is_hidden("#class-box") and page.is_hidden("#top_k")
    assert page.get_attribute("#cfg", "min") == "1"
    page.click("#generate")
    assert page.inner_text("#notice-text") == "Write what to generate first."
    assert focused(page) == "prompt"
    page.fill("#seed", "4")
    page.fill("#negative", "blue")
    page.fill("#prompt", "a red")
    page.press("#prompt", "Shift+Enter")
    ask(page, page.input_value("#prompt") + "fox")
    (image,) = shown(page)
    assert image.shape == (HEIGHT, WIDTH, 3)
    expected = asked(service, prompt="a red fox", negative="blue", seed=4)
    np.testing.assert_array_equal(image, expected)
    frame = page.locator(".tile").bounding_box()
    assert frame["width"] / frame["height"] == pytest.approx(WIDTH / HEIGHT, rel=0.01)
    told = "the text encoder does not know: fox"
    assert page.inner_text("#prompt-remarks") == told, "it has no piece for an x"
    assert "a red fox, seed 4" in page.inner_text("#caption")
    assert "Without “blue”" in page.inner_text("#caption")
    said = {"prompt": ["a red fox"], "negative": ["blue"], "seed": ["4"]}
    assert parse_qs(query(page)) == said

    page.fill("#negative", "")
    ask(page, "the sea")
    assert page.inner_text("#prompt-remarks") == ""
    page.click("#gallery button >> nth=1")
    page.click("#use-settings")
    assert page.input_value("#prompt") == "a red fox"
    assert page.input_value("#negative") == "blue"
    assert parse_qs(query(page)) == said
    assert accessibility_faults(page) == []


def test_examples_fill_the_field(visit: Visit, service: Client) -> None:
    known = service.get("/v1/model").json["examples"]
    page = visit()
    assert page.get_attribute("#prompt", "placeholder") == f"such as: {known[0]}"
    assert page.locator("#examples button").all_inner_texts() == known[:4]
    page.click(f"#examples button >> text={known[1]}")
    assert page.input_value("#prompt") == known[1] and focused(page) == "prompt"
    page.keyboard.press("Enter")
    finished(page)
    assert parse_qs(query(page))["prompt"] == [known[1]]
    page.click("#edit-this")
    assert page.input_value("#prompt") == ""
    page.click("#examples button >> nth=0")
    assert page.input_value("#prompt") == known[0]
    assert page.is_hidden("#notice"), "nothing was sent"


def test_unknown_words_are_marked_in_the_field(visit: Visit) -> None:
    def marked() -> list[str]:
        return page.locator("#prompt-marks mark").all_inner_texts()

    page = visit(viewport={"width": 1280, "height": 800})
    page.fill("#prompt", "a fox, foxes and a FOX")
    assert marked() == [], "the service has not told of any word yet"
    ask(page, "a fox, foxes and a FOX")
    assert "fox" in marked() and "a" not in marked()
    assert page.inner_text("#prompt-remarks").endswith(", ".join(dict.fromkeys(marked())))
    # the marks lie under their words: the text behind the field breaks where that in it does
    heights = "[...document.querySelectorAll('#prompt, #prompt-marks')].map(e => e.scrollHeight)"
    page.fill("#prompt", "a red fox " * 30)
    assert len(set(page.evaluate(heights))) == 1
    page.evaluate("document.querySelector('#prompt').scrollTop = 1e4")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    places = "[...document.querySelectorAll('#prompt, #prompt-marks')].map(e => e.scrollTop)"
    field, marks = page.evaluate(places)
    assert field == marks > 0
    assert len(marked()) == 30, "a word that is known to be unknown is marked while it is written"
    page.fill("#prompt", "the sea")
    assert marked() == []
    assert accessibility_faults(page) == []


def test_a_link_with_a_prompt_generates_at_once_on_a_phone(
    visit: Visit, service: Client
) -> None:
    page = visit("?prompt=%E7%8B%90%E7%8B%B8&seed=3&cfg=2", viewport={"width": 390, "height": 800})
    finished(page)
    np.testing.assert_array_equal(shown(page)[0], asked(service, prompt="狐狸", seed=3, cfg=2))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_part_is_filled_with_a_prompt_and_varied(visit: Visit) -> None:
    page = visit("?prompt=the+sea&seed=2")
    finished(page)
    (old,) = shown(page)
    page.click("#edit-this")
    page.select_option("#region", "left")
    assert page.inner_text("#marked") == "50 % is marked."
    assert page.input_value("#prompt") == "", "an edit has a prompt of its own"
    ask(page, "a boat")
    (new,) = shown(page)
    np.testing.assert_array_equal(new[:, WIDTH // 2 :], old[:, WIDTH // 2 :])
    assert (new[:, : WIDTH // 2] != old[:, : WIDTH // 2]).any()
    with page.expect_request("**/v1/vary/stream") as sent:
        page.click("#vary")
    finished(page)
    assert sent.value.post_data_json["prompt"] == "a boat"
    assert len(shown(page)) == 4


def test_a_mask_has_the_shape_of_the_model(visit: Visit) -> None:
    page = visit()
    page.set_input_files("#file", file((200, 30, 30), 40, 40))
    page.wait_for_selector("#mask-editor", state="visible")
    page.get_by_text("Box", exact=True).click()
    frame = page.locator("#mask").bounding_box()
    cell = frame["width"] / WIDTH
    assert frame["height"] / cell == pytest.approx(HEIGHT, abs=0.1)
    page.mouse.move(frame["x"] + 1.5 * cell, frame["y"] + 2.5 * cell)
    page.mouse.down()
    page.mouse.move(frame["x"] + 20.5 * cell, frame["y"] + 12.5 * cell)
    page.mouse.up()
    with page.expect_request("**/v1/edit/stream") as sent:
        page.click("#generate")
    finished(page)
    wanted = np.zeros((HEIGHT, WIDTH), np.uint8)
    wanted[2:13, 1:21] = 255
    body = sent.value.post_data_json
    np.testing.assert_array_equal(pixels(body["mask"])[..., 0], wanted)
    assert body["prompt"] == "", "nothing said: what fits"


DROP = """file => {
  const dataTransfer = new DataTransfer();
  if (file) dataTransfer.items.add(new File(["x"], "x.txt"));
  else dataTransfer.setData("text/plain", "a red fox");
  const event = new DragEvent("dragover", { dataTransfer, bubbles: true, cancelable: true });
  document.querySelector("#prompt").dispatchEvent(event);
  return event.defaultPrevented;
}"""


def test_text_can_be_dropped_on_the_prompt(visit: Visit) -> None:
    page = visit()
    assert not page.evaluate(DROP, False), "the browser's own"
    assert page.evaluate(DROP, True), "a picture, which the page opens"
