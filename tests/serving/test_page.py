"""The page at /, in a browser without a screen."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving.client import Client

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOLDER = Path(__file__).parents[2] / "var_deploy" / "serving" / "page"
SIDE, SCALES = 8, 3  # of the small model

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed, so no browser can be driven"
    )
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(PROGRAMS)}")
    with playwright.sync_playwright() as driver:
        # in a container Chromium's own sandbox cannot be set up
        yield driver.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def visit(browser: Any, service: Client) -> Iterator[Callable[..., Any]]:
    """Opens the page, at a query, as a visitor of its own; no script may fail on it, and nobody
    but the service may be asked for anything."""
    address = f"http://127.0.0.1:{service.port}"
    contexts, wrong = [], []

    def asked(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(request.url)

    def begin(query: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(reduced_motion="reduce", **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.goto(f"{address}/{query}")
        page.wait_for_selector("body[data-ready]")
        return page

    yield begin
    for context in contexts:
        context.close()
    assert not wrong


def finished(page: Any) -> None:
    page.wait_for_selector("#panel[aria-busy=false]")
    page.wait_for_selector("#actions", state="visible")


def draw(page: Any, label: str, seed: int, count: int = 1) -> None:
    page.get_by_text(label, exact=True).click()
    page.fill("#seed", str(seed))
    page.fill("#count", str(count))
    page.click("#draw")
    finished(page)


def shown(page: Any) -> list[Pixels]:
    """Pictures on the stage, in order."""
    sources = page.eval_on_selector_all(
        ".tile:not([hidden]) img:not(.ghost)", "images => images.map(image => image.src)"
    )
    return [pixels(source) for source in sources]


def pixels(url: str) -> Pixels:
    with Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def file(colour: tuple[int, int, int], width: int, height: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "png")
    return {"name": "mine.png", "mimeType": "image/png", "buffer": stream.getvalue()}


def expected(service: Client, label: str, seed: int) -> Pixels:
    reply = service.post("/v1/images", {"labels": [label], "seed": seed})
    return reply.images()[0]


def query(page: Any) -> str:
    return urlsplit(page.url).query


def test_a_picture_is_drawn_and_its_link_shows_it_again(
    visit: Callable[..., Any], service: Client
) -> None:
    page = visit()
    draw(page, "heart", 3)
    assert query(page) == "label=heart&seed=3"
    (image,) = shown(page)
    np.testing.assert_array_equal(image, expected(service, "heart", 3))
    assert page.get_attribute("#download", "download") == "heart-seed-3.png"
    assert page.locator("#gallery li").count() == 1

    again = visit(f"?{query(page)}")
    finished(again)
    np.testing.assert_array_equal(shown(again)[0], image)


def test_settings_travel_in_the_link(visit: Callable[..., Any]) -> None:
    page = visit("?label=2&seed=7&count=2&top_k=4&cfg=1.5&temperature=oops")
    finished(page)
    assert page.is_checked("#chips input[value='2']")
    assert [page.input_value(f"#{name}-number") for name in ("top_k", "cfg")] == ["4", "1.5"]
    assert query(page) == "label=house&seed=7&count=2&cfg=1.5&top_k=4"
    page.click("#defaults")
    page.click("#draw")
    finished(page)
    assert query(page) == "label=house&seed=7&count=2"


def test_every_scale_can_be_looked_at(visit: Callable[..., Any]) -> None:
    page = visit("?label=tree&seed=1")
    finished(page)
    (done,) = shown(page)
    thumbs = page.locator("#strip button:enabled")
    assert thumbs.count() == SCALES
    thumbs.first.click()
    assert (shown(page)[0] != done).any()
    assert "scale 1 of 3" in page.inner_text("#caption")
    thumbs.last.click()
    np.testing.assert_array_equal(shown(page)[0], done)


def test_each_of_several_pictures_has_a_seed_of_its_own(
    visit: Callable[..., Any], service: Client
) -> None:
    page = visit()
    draw(page, "fish", 10, count=3)
    images = shown(page)
    for n, image in enumerate(images):
        np.testing.assert_array_equal(image, expected(service, "fish", 10 + n))
    page.click(".tile >> nth=1")
    np.testing.assert_array_equal(shown(page), images[1:2])
    assert "seed 11" in page.inner_text("#caption")
    page.keyboard.press("Escape")
    assert len(shown(page)) == 3

    page.click("#gallery button >> nth=0")  # the newest
    assert query(page) == "label=fish&seed=12"
    np.testing.assert_array_equal(shown(page), images[2:])


def test_a_part_is_drawn_anew_and_the_rest_stays(visit: Callable[..., Any]) -> None:
    page = visit("?label=star&seed=2")
    finished(page)
    (old,) = shown(page)
    page.click("#edit-this")
    page.select_option("#region", "left")
    assert "50 %" in page.inner_text("#marked")
    page.get_by_text("heart", exact=True).click()
    page.click("#draw")
    finished(page)
    (new,) = shown(page)
    np.testing.assert_array_equal(new[:, SIDE // 2 :], old[:, SIDE // 2 :])
    assert (new[:, : SIDE // 2] != old[:, : SIDE // 2]).any()
    page.click("#before")
    np.testing.assert_array_equal(shown(page)[0], old)
    page.click("#back")
    assert "50 %" in page.inner_text("#marked"), "the mask is still there"


def test_a_box_on_a_picture_of_ones_own(visit: Callable[..., Any]) -> None:
    page = visit()
    page.set_input_files("#file", file((200, 30, 30), 40, 20))
    page.wait_for_selector("#easel", state="visible")
    page.get_by_text("Box", exact=True).click()
    frame = page.locator("#mask").bounding_box()
    cell = frame["width"] / SIDE
    page.mouse.move(frame["x"] + 1.5 * cell, frame["y"] + 2.5 * cell)
    page.mouse.down()
    page.mouse.move(frame["x"] + 4.5 * cell, frame["y"] + 6.5 * cell)
    page.mouse.up()
    page.click("#invert")
    with page.expect_request("**/v1/edit/stream") as asked:
        page.click("#draw")
    finished(page)
    sent = asked.value.post_data_json
    wanted = np.full((SIDE, SIDE), 255, np.uint8)
    wanted[2:7, 1:5] = 0
    np.testing.assert_array_equal(pixels(sent["mask"])[..., 0], wanted)
    assert pixels(sent["image"]).shape == (20, 40, 3), "as it was chosen"
    assert np.ptp(shown(page)[0][3:6, 2:4], axis=(0, 1)).max() <= 1, "one colour, as before"


def test_a_mask_is_painted_with_the_keyboard(visit: Callable[..., Any]) -> None:
    page = visit()
    page.set_input_files("#file", file((30, 200, 30), SIDE, SIDE))
    page.wait_for_selector("#easel", state="visible")
    page.click("#draw")
    assert page.inner_text("#notice-text") == "Mark what to draw anew first."
    page.fill("#size", "1")
    page.focus("#mask")
    for key in ("Space", "Shift+ArrowRight", "Space"):
        page.keyboard.press(key)
    assert page.inner_text("#marked") == f"{round(100 * 2 / SIDE**2)} % is marked."
    page.click("#undo")
    assert page.inner_text("#marked") == f"{round(100 / SIDE**2)} % is marked."
    page.click("#undo")
    assert page.inner_text("#marked") == "Nothing is marked yet."


def test_errors_are_told_in_a_sentence(visit: Callable[..., Any]) -> None:
    page = visit("?label=star&seed=1")
    finished(page)
    before = shown(page)
    stream = "**/v1/images/stream"

    def answer(handler: Callable[[Any], None], sentence: str, retry: bool) -> None:
        page.route(stream, handler)
        page.click("#draw")
        page.wait_for_selector("#notice", state="visible")
        finished(page)
        assert page.inner_text("#notice-text") == sentence
        assert page.is_visible("#again") is retry
        np.testing.assert_array_equal(shown(page), before, "the picture is still there")
        page.unroute(stream)

    answer(
        lambda route: route.fulfill(status=429, headers={"Retry-After": "3"}, json={"error": "-"}),
        "The service is busy: its queue is full. Try again in 3 seconds.",
        True,
    )
    answer(
        lambda route: route.fulfill(status=400, json={"error": "no class is called 'x'"}),
        "No class is called 'x'.",
        False,
    )
    answer(lambda route: route.abort(), "The service cannot be reached. Is it running?", True)
    answer(
        lambda route: route.fulfill(body='event: queued\ndata: {"position": 0}\n\n'),
        "The connection was lost before the picture was finished. Is the service running?",
        True,
    )
    page.click("#again")
    finished(page)
    assert not page.is_visible("#notice")
    np.testing.assert_array_equal(shown(page), before)


def test_what_takes_too_long_can_be_stopped(visit: Callable[..., Any], gate: Any) -> None:
    page = visit()
    page.click("#draw")
    gate.reached()
    assert page.inner_text("#draw") == "Stop"
    page.click("#draw")
    page.wait_for_selector("#panel[aria-busy=false]")
    assert page.inner_text("#draw") == "Draw"
    assert page.inner_text("#status") == "Stopped."
    assert page.is_visible("#empty")
    gate.let_go(1)


def test_many_classes_are_typed_and_defaults_may_vary_by_scale(visit: Callable[..., Any]) -> None:
    def answer(route: Any) -> None:
        model = route.fetch().json()
        model["labels"] += [f"thing {n}" for n in range(995)]
        model["defaults"]["cfg"] = [0, 1, 2]
        route.fulfill(json=model)

    page = visit()
    page.route("**/v1/model", answer)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#class-names option").count() == 1000
    assert page.input_value("#cfg-number") == ""
    page.fill("#class-text", "house")
    page.fill("#seed", "4")
    with page.expect_request("**/v1/images/stream") as asked:
        page.keyboard.press("Enter")
    assert asked.value.post_data_json == {"labels": ["house"], "count": 1, "seed": [4]}
    finished(page)
    assert query(page) == "label=house&seed=4"


def test_everything_has_a_name(visit: Callable[..., Any]) -> None:
    page = visit("?label=star&seed=1&count=2")
    finished(page)
    page.click(".tile >> nth=0")
    page.click("#edit-this")
    page.wait_for_selector("#easel", state="visible")
    page.click("#settings summary")
    tree = page.locator("body").aria_snapshot()
    roles = "button|link|radio|slider|spinbutton|combobox|checkbox|img|radiogroup|application"
    nameless = re.findall(rf"^\s*- (?:{roles})(?: \[.*|:)?$", tree, re.MULTILINE)
    assert not nameless
    assert 'slider "Guidance"' in tree
    assert 'button "star, seed 2"' in tree


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_it_fits(visit: Callable[..., Any], width: int) -> None:
    page = visit("?label=star&seed=1", viewport={"width": width, "height": 800})
    finished(page)
    page.click("#edit-this")
    page.wait_for_selector("#easel", state="visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_comes_from_elsewhere() -> None:
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".html", ".css", ".js", ".svg"):
            text = re.sub(r"^\s*(/\*\*|\*|//).*", "", path.read_text("utf-8"), flags=re.M)
            named = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\"'\s]*", text))
            assert named <= {"http://www.w3.org/2000/svg"}, path.name
