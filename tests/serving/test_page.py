"""The page at /, in a browser without a screen: what is asked for, and what comes of it."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving.browser import (
    Visit,
    expected,
    file,
    finished,
    focused,
    generate,
    open_page,
    pixels,
    query,
    shown,
)
from serving.client import Client

from var_deploy.pipeline import Pipeline

FOLDER = Path(__file__).parents[2] / "var_deploy" / "serving" / "page"
SIDE, SCALES, CODES = 8, 3, 48  # of the small model


def test_a_picture_is_generated_and_its_link_shows_it_again(
    visit: Visit, service: Client
) -> None:
    page = visit()
    generate(page, "heart", 3)
    assert query(page) == "label=heart&seed=3"
    (image,) = shown(page)
    np.testing.assert_array_equal(image, expected(service, "heart", 3))
    assert page.get_attribute("#download", "download") == "heart-seed-3.png"
    assert page.locator("#gallery li").count() == 1

    again = visit(f"?{query(page)}")
    finished(again)
    np.testing.assert_array_equal(shown(again)[0], image)


def test_settings_travel_in_the_link(visit: Visit) -> None:
    page = visit("?label=2&seed=7&count=2&top_k=4&cfg=1.5&temperature=oops")
    finished(page)
    assert page.is_checked("#chips input[value='2']")
    assert [page.input_value(f"#{name}-number") for name in ("top_k", "cfg")] == ["4", "1.5"]
    assert query(page) == "label=house&seed=7&count=2&cfg=1.5&top_k=4"
    page.click("#defaults")
    page.click("#generate")
    finished(page)
    assert query(page) == "label=house&seed=7&count=2"


def test_every_scale_can_be_looked_at(visit: Visit) -> None:
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
    visit: Visit, service: Client
) -> None:
    page = visit()
    generate(page, "fish", 10, count=3)
    images = shown(page)
    for n, image in enumerate(images):
        np.testing.assert_array_equal(image, expected(service, "fish", 10 + n))
    page.click(".tile >> nth=1")
    np.testing.assert_array_equal(shown(page), images[1:2])
    assert "seed 11" in page.inner_text("#caption")
    page.keyboard.press("Escape")
    assert len(shown(page)) == 3

    page.click("#gallery button >> nth=0")  # the newest
    page.click("#use-settings")
    assert query(page) == "label=fish&seed=12"
    np.testing.assert_array_equal(shown(page), images[2:])


def test_a_part_is_filled_and_the_rest_stays(visit: Visit) -> None:
    page = visit("?label=star&seed=2")
    finished(page)
    (old,) = shown(page)
    page.click("#edit-this")
    page.select_option("#region", "left")
    assert "50 %" in page.inner_text("#marked")
    page.get_by_text("heart", exact=True).click()
    page.click("#generate")
    finished(page)
    (new,) = shown(page)
    np.testing.assert_array_equal(new[:, SIDE // 2 :], old[:, SIDE // 2 :])
    assert (new[:, : SIDE // 2] != old[:, : SIDE // 2]).any()
    page.click("#before")
    np.testing.assert_array_equal(shown(page)[0], old)
    page.click("#back")
    assert "50 %" in page.inner_text("#marked"), "the mask is still there"


def test_a_box_on_a_picture_of_ones_own(visit: Visit) -> None:
    page = visit()
    page.set_input_files("#file", file((200, 30, 30), 40, 20))
    page.wait_for_selector("#mask-editor", state="visible")
    page.get_by_text("Box", exact=True).click()
    frame = page.locator("#mask").bounding_box()
    cell = frame["width"] / SIDE
    page.mouse.move(frame["x"] + 1.5 * cell, frame["y"] + 2.5 * cell)
    page.mouse.down()
    page.mouse.move(frame["x"] + 4.5 * cell, frame["y"] + 6.5 * cell)
    page.mouse.up()
    page.click("#invert")
    with page.expect_request("**/v1/edit/stream") as asked:
        page.click("#generate")
    finished(page)
    sent = asked.value.post_data_json
    wanted = np.full((SIDE, SIDE), 255, np.uint8)
    wanted[2:7, 1:5] = 0
    np.testing.assert_array_equal(pixels(sent["mask"])[..., 0], wanted)
    assert pixels(sent["image"]).shape == (20, 40, 3), "as it was chosen"
    assert np.ptp(shown(page)[0][3:6, 2:4], axis=(0, 1)).max() <= 1, "one colour, as before"


def test_a_mask_is_painted_with_the_keyboard(visit: Visit) -> None:
    page = visit()
    page.set_input_files("#file", file((30, 200, 30), SIDE, SIDE))
    page.wait_for_selector("#mask-editor", state="visible")
    page.click("#generate")
    assert page.inner_text("#notice-text") == "Mark what to fill first."
    page.fill("#size", "1")
    page.focus("#mask")
    for key in ("Space", "Shift+ArrowRight", "Space"):
        page.keyboard.press(key)
    assert page.inner_text("#marked") == f"{round(100 * 2 / SIDE**2)} % is marked."
    page.click("#undo")
    assert page.inner_text("#marked") == f"{round(100 / SIDE**2)} % is marked."
    page.click("#undo")
    assert page.inner_text("#marked") == "Nothing is marked yet."


def test_errors_are_told_in_a_sentence(visit: Visit) -> None:
    page = visit("?label=star&seed=1")
    finished(page)
    before = shown(page)
    stream = "**/v1/images/stream"

    def answer(handler: Callable[[Any], None], sentence: str, retry: bool) -> None:
        page.route(stream, handler)
        page.click("#generate")
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


def test_a_link_to_a_class_that_is_not_there_says_so(visit: Visit) -> None:
    page = visit("?label=unicorn&label=star&label=99&seed=3")
    assert page.inner_text("#notice-text") == (
        "The link names the classes “unicorn” and “99”, which this model does not have. "
        "Choose another."
    )
    assert page.is_visible("#empty"), "nothing else is generated in their place"
    assert page.input_value("#seed") == "3"
    page.click("#generate")
    finished(page)
    assert query(page) == "label=star&seed=3"


def test_a_link_without_a_seed_fills_the_form_in(visit: Visit) -> None:
    page = visit("?label=house")
    assert page.is_checked("#chips input[value='2']") and page.is_visible("#empty")


def test_several_classes_at_once(visit: Visit, service: Client) -> None:
    page = visit()
    page.check("#several")
    for label in ("heart", "tree", "no class", "star"):  # star was chosen: now it is not
        page.get_by_text(label, exact=True).click()
    assert page.input_value("#count") == "3", "one for each"
    page.fill("#seed", "5")
    page.fill("#count", "2")
    page.click("#generate")
    assert page.is_visible("#empty"), "the browser says that two are too few"
    page.fill("#count", "4")
    with page.expect_request("**/v1/images/stream") as asked:
        page.click("#generate")
    sent = asked.value.post_data_json
    assert sent == {"labels": ["heart", "tree", None], "count": 4, "seed": [5, 6, 7, 8]}
    finished(page)
    assert query(page) == "label=heart&label=tree&label=none&seed=5&count=4"
    images = shown(page)
    for n, label in enumerate(("heart", "tree", None, "heart")):
        np.testing.assert_array_equal(images[n], expected(service, label, 5 + n))

    again = visit(f"?{query(page)}")
    finished(again)
    np.testing.assert_array_equal(shown(again), images)
    again.uncheck("#several")
    assert again.input_value("#count") == "4" and again.is_checked("#chips input[value='1']")
    again.click("#gallery button >> nth=1")  # the one without a class
    again.click("#use-settings")
    assert query(again) == "seed=7" and again.is_checked("#chips input[value='']")


def test_no_more_classes_than_pictures(visit: Visit) -> None:
    def answer(route: Any) -> None:
        model = route.fetch().json()
        model["limits"]["count"] = 2
        route.fulfill(json=model)

    page = visit()
    page.route("**/v1/model", answer)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.check("#several")
    for label in ("heart", "tree"):
        page.get_by_text(label, exact=True).click()
    assert "makes 2 pictures at once" in page.inner_text("#notice-text")
    assert not page.is_checked("#chips input[value='3']")


def test_filters_keep_all_codes_at_the_right_end(visit: Visit) -> None:
    page = visit()
    assert page.get_attribute("#top_k", "max") == str(CODES)
    assert page.input_value("#top_k") == str(CODES), "the default of 900 keeps all of them"
    assert page.input_value("#top_k-number") == "all"

    def sent() -> dict[str, Any]:
        with page.expect_request("**/v1/images/stream") as asked:
            page.click("#generate")
        finished(page)
        body: dict[str, Any] = asked.value.post_data_json
        return {key: body[key] for key in ("top_k", "top_p") if key in body}

    assert sent() == {}
    page.focus("#top_k")
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#top_k-number") == str(CODES - 1)
    assert page.get_attribute("#top_k", "aria-valuetext") == str(CODES - 1)
    page.focus("#top_p")
    page.keyboard.press("End")
    assert page.input_value("#top_p-number") == "all"
    assert sent() == {"top_k": CODES - 1, "top_p": 0}
    assert query(page).endswith("top_k=47&top_p=0")
    page.fill("#top_k-number", "a few")
    page.click("#generate")
    assert not page.is_visible("#generate:has-text('Stop')")
    assert page.eval_on_selector("#top_k-number", "field => !field.checkValidity()")


def test_more_like_a_picture_from_a_scale_on(visit: Visit, pipe: Pipeline) -> None:
    page = visit("?label=star&seed=2&cfg=1.5")
    finished(page)
    (old,) = shown(page)
    page.click("#strip button >> nth=1")  # to keep what is there after scale 2
    assert page.input_value("#from-scale") == "2"
    with page.expect_request("**/v1/vary/stream") as asked:
        page.click("#vary")
    assert focused(page) == "generate", "where it can be stopped"
    finished(page)
    sent = asked.value.post_data_json
    np.testing.assert_array_equal(pixels(sent["image"]), old)
    assert (sent["from_scale"], sent["label"], sent["cfg"]) == (2, "star", 1.5)
    chosen = {"label": "star", "cfg": 1.5, "seed": sent["seed"]}
    np.testing.assert_array_equal(shown(page), pipe.vary(old, 2, **chosen))
    assert query(page) == "label=star&seed=2&cfg=1.5", "a link cannot hold the picture"
    page.click(".tile >> nth=1")
    assert "varied from scale 3" in page.inner_text("#caption")
    assert not page.is_visible("#copy-link")
    page.click("#before")
    np.testing.assert_array_equal(shown(page)[0], old)


def test_older_pictures_offer_their_settings(visit: Visit) -> None:
    page = visit()
    page.fill("#cfg-number", "1.5")
    generate(page, "fish", 10)
    page.click("#defaults")
    generate(page, "tree", 11)
    assert not page.is_visible("#use-settings")
    page.click("#gallery button >> nth=1")
    assert re.fullmatch(r"fish, seed 10, in .* · Guidance 1\.5", page.inner_text("#caption"))
    assert page.input_value("#seed") == "11", "they are not taken unasked"
    page.click("#use-settings")
    assert [page.input_value(field) for field in ("#seed", "#cfg-number")] == ["10", "1.5"]
    assert page.is_checked("#chips input[value='4']")
    assert not page.is_visible("#use-settings") and focused(page) == "generate"


def test_settings_of_an_edit_come_with_its_picture(visit: Visit) -> None:
    page = visit()
    page.set_input_files("#file", file((200, 30, 30), SIDE, SIDE))
    page.wait_for_selector("#mask-editor", state="visible")
    page.select_option("#region", "top")
    generate(page, "heart", 4)
    page.get_by_text("Generate", exact=True).first.click()
    page.click("#gallery button")
    page.click("#use-settings")
    page.wait_for_selector("#mask-editor", state="visible")
    assert page.input_value("#seed") == "4" and page.is_checked("#chips input[value='1']")
    assert page.inner_text("#marked") == "Nothing is marked yet."


def test_the_history_survives_a_reload(visit: Visit, service: Client) -> None:
    page = visit("?label=star&seed=2&count=2")
    finished(page)
    images = shown(page)
    page.wait_for_function(STORED, arg=2)
    address = f"http://127.0.0.1:{service.port}/"
    open_page(page, address)
    assert page.locator("#gallery li").count() == 2
    page.click("#gallery button >> nth=1")
    np.testing.assert_array_equal(shown(page)[0], images[0])
    assert page.locator("#strip button:enabled").count() == SCALES
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#clear-history")
    page.wait_for_selector("#gallery-actions", state="hidden")
    assert focused(page) == "gallery-title"
    open_page(page, address)
    assert page.locator("#gallery li").count() == 0


STORED = """count => new Promise(resolve => {
  const opening = indexedDB.open("var-deploy");
  opening.onsuccess = () => {
    const counting = opening.result.transaction("pictures").objectStore("pictures").count();
    counting.onsuccess = () => resolve(counting.result === count);
  };
})"""  # whether so many pictures are kept
BOUNDS = """async () => {
  const { PictureStore } = await import("/page/picture_store.js");
  const store = new PictureStore();
  await store.open("one");
  const picture = { digest: "one", png: "p", before: null, scales: ["s".repeat(1e6)] };
  for (let n = 0; n < 250; n++) await store.add({ ...picture, n });
  const many = await new PictureStore().open("one");
  const large = { digest: "two", png: "p".repeat(30e6), before: null, scales: [] };
  for (let n = 0; n < 3; n++) await store.add({ ...large, n });
  const counts = [];
  for (const digest of ["one", "two"]) counts.push((await new PictureStore().open(digest)).length);
  return [many.map(({ n }) => n), many.filter(({ scales }) => scales.length).length, counts];
}"""


def test_the_history_has_bounds(visit: Visit) -> None:
    numbers, with_scales, (small, large) = visit().evaluate(BOUNDS)
    assert numbers == list(range(249, 9, -1)), "240 pictures, the newest first"
    assert with_scales == 24, "24 MB of previews"
    assert (small, large) == (0, 2), "64 MB in all"


def test_a_browser_that_keeps_nothing_says_so(visit: Visit, service: Client) -> None:
    page = visit(ready=False)
    page.add_init_script("indexedDB.open = () => { throw new Error('not here'); }")
    open_page(page, f"http://127.0.0.1:{service.port}/?label=star&seed=2")
    finished(page)
    assert page.locator("#gallery li").count() == 1
    assert "until you leave the page" in page.inner_text("#gallery-hint")


@pytest.mark.parametrize("button", ["#download-set", "#download-all"])
def test_all_pictures_come_as_one_file(visit: Visit, tmp_path: Path, button: str) -> None:
    page = visit("?label=star&seed=2&count=3")
    finished(page)
    with page.expect_download() as started:
        page.click(button)
    started.value.save_as(tmp_path / "pictures.zip")
    with zipfile.ZipFile(tmp_path / "pictures.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{n + 1}-star-seed-{n + 2}.png" for n in range(3)]
        for name, image in zip(archive.namelist(), shown(page), strict=True):
            with Image.open(io.BytesIO(archive.read(name))) as found:
                np.testing.assert_array_equal(np.asarray(found), image)


def test_undo_and_redo_with_the_keyboard(visit: Visit) -> None:
    page = visit()
    page.set_input_files("#file", file((30, 200, 30), SIDE, SIDE))
    page.wait_for_selector("#mask-editor", state="visible")
    page.select_option("#region", "left")
    page.click("#invert")
    page.select_option("#region", "all")
    marked = []
    for keys in (*["Control+z"] * 4, "Control+y", "Control+Shift+z"):
        page.keyboard.press(keys)  # wherever the focus is, but for fields
        marked.append(page.inner_text("#marked").split()[0])
    assert marked == ["50", "50", "Nothing", "Nothing", "50", "50"]
    page.focus("#seed")
    page.keyboard.press("Control+z")
    assert page.inner_text("#marked") == "50 % is marked.", "a field has an undo of its own"
    page.click("#undo")
    assert page.get_attribute("#redo", "aria-disabled") == "false"
    page.click("#clear")
    assert page.get_attribute("#redo", "aria-disabled") == "true", "there is another future now"


def test_the_focus_goes_where_the_work_goes_on(visit: Visit) -> None:
    page = visit("?label=star&seed=2&count=2")
    finished(page)
    page.focus(".tile >> nth=1")
    page.keyboard.press("Enter")
    page.focus("#show-all")
    page.keyboard.press("Enter")
    tile = "[...document.querySelectorAll('.tile')].indexOf(document.activeElement)"
    assert page.evaluate(tile) == 1
    page.keyboard.press("Enter")
    page.focus("#edit-this")
    page.keyboard.press("Enter")
    page.wait_for_selector("#mask-editor", state="visible")
    assert focused(page) == "mask"
    page.select_option("#region", "left")
    page.focus("#generate")
    page.keyboard.press("Enter")
    finished(page)
    assert focused(page) == "generate"
    page.focus("#back")
    page.keyboard.press("Enter")
    assert focused(page) == "mask"
    page.focus("[name=mode]:checked")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#generate") == "Generate"
    assert page.evaluate("document.activeElement.name") == "mode", "as the arrows are used there"
    page.focus("#another")
    page.keyboard.press("Enter")
    finished(page)
    assert focused(page) == "another"


def test_what_takes_too_long_can_be_stopped(visit: Visit, gate: Any) -> None:
    page = visit()
    page.click("#generate")
    gate.reached()
    assert page.inner_text("#generate") == "Stop"
    page.click("#generate")
    page.wait_for_selector("#panel[aria-busy=false]")
    assert page.inner_text("#generate") == "Generate"
    assert page.is_visible("#status")
    confirmed = r"Stopped after \d+\.\d s, at scale 1 of 3; nothing was kept\."
    assert re.fullmatch(confirmed, page.inner_text("#status"))
    assert page.is_visible("#empty")
    gate.let_go(1)


def test_a_double_click_does_not_stop_what_it_begins(visit: Visit) -> None:
    page = visit()
    page.dblclick("#generate")
    finished(page)
    assert page.inner_text("#status").startswith("Done in ")


def test_nothing_comes_from_elsewhere() -> None:
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".html", ".css", ".js", ".svg"):
            text = re.sub(r"^\s*(/\*\*|\*|//).*", "", path.read_text("utf-8"), flags=re.M)
            named = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\"'\s]*", text))
            assert named <= {"http://www.w3.org/2000/svg"}, path.name
