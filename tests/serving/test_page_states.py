"""The page while it waits, on screens of any size, by keyboard alone, and as axe judges it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import numpy as np
import pytest
from serving.browser import Visit, accessibility_faults, finished, focused
from serving.client import Client, running

from var_deploy.config import Loaded
from var_deploy.pipeline import Pipeline

SCALES = 3
SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1366, "height": 768}},
    "phone": {"viewport": {"width": 390, "height": 760}, "has_touch": True, "is_mobile": True},
    "dark": {"viewport": {"width": 1366, "height": 768}, "color_scheme": "dark"},
    "dark phone": {"viewport": {"width": 320, "height": 700}, "color_scheme": "dark"},
}


class Paced:
    """A backend that draws nothing, one scale at each step of the test."""

    def __init__(self, manifest: Any) -> None:
        self.manifest, self.stopping = manifest, False
        self.left = threading.Event()  # somebody has hung up
        self._steps = threading.Semaphore(0)

    def step(self) -> None:
        self._steps.release()

    def describe(self) -> Loaded:
        return Loaded(precision="fp32", backend="paced", layout="shared")

    async def draw(self, work: Any) -> AsyncGenerator[Any, None]:
        from var_deploy.serving.backend import Drawn, Queued, ScaleDone

        images = np.zeros((work.count, 8, 8, 3), np.uint8)
        done = np.full(work.count, SCALES)
        try:
            for position in (1, 0):
                yield Queued(position=position)
                await self._wait()
            for first in range(0, work.count, self.manifest.batch):
                batch = images[first : first + self.manifest.batch]
                for scale in range(SCALES):
                    yield ScaleDone(scale=scale, scales=SCALES, first=first, images=batch)
                    await self._wait()
            yield Drawn(images=images, scales_done=done)
        finally:
            self.left.set()

    async def _wait(self) -> None:
        while not self._steps.acquire(blocking=False):
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self.stopping = True

    def abort(self) -> None:
        self.stopping = True


@pytest.fixture
def paced(pipe: Pipeline) -> Iterator[tuple[Client, Paced]]:
    """A service whose batches of two took 40 s lately."""
    from var_deploy.serving.app import create_app
    from var_deploy.serving.metrics import Metrics

    backend, metrics = Paced(pipe.manifest), Metrics()
    metrics.drew(2, 40.0)
    with running(create_app(backend, metrics=metrics)) as client:
        yield client, backend


def test_a_slow_model_shows_scale_and_time(visit: Visit, paced: tuple[Client, Paced]) -> None:
    client, backend = paced
    page = visit(ready=False, to=client)
    page.clock.install()
    page.goto(f"http://127.0.0.1:{client.port}/")
    page.wait_for_selector("body[data-ready]")
    page.fill("#count", "3")
    page.click("#generate")

    def caption(wanted: str) -> None:
        page.clock.run_for(500)
        page.wait_for_function(
            "wanted => new RegExp(wanted).test(document.querySelector('#caption').innerText)",
            arg=wanted,
        )

    caption("^Waiting: 1 request is before this one")
    backend.step()
    which = "pictures 1 to 2 of 3"
    caption(rf"^Generating scale 1 of 3 \(1 × 1\) · {which} · \d+ s of about 1 min 20 s$")
    assert page.is_visible("#progress")
    page.clock.run_for(12_000)
    backend.step()
    caption(rf"^Generating scale 2 of 3 \(2 × 2\) · {which} · 1[2-9] s of about 1 min ")
    assert page.locator("#strip .current").get_attribute("aria-label") == "Scale 2 of 3, 2 by 2"
    assert 0 < page.eval_on_selector("#progress", "bar => bar.value") < 0.5
    for _ in range(2):
        backend.step()
    caption(r"^Generating scale 1 of 3 \(1 × 1\) · picture 3 of 3 · ")
    assert not accessibility_faults(page)
    page.click("#generate")
    page.wait_for_selector("#panel[aria-busy=false]")
    assert re.match(r"Stopped after \d+\.\d s, at scale 1 of 3", page.inner_text("#status"))
    assert page.is_hidden("#progress")
    assert backend.left.wait(30), "the service has heard of it"


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_can_be_pressed_before_the_model_is_known(
    visit: Visit, service: Client, screen: str
) -> None:
    page, held = visit(ready=False, **SCREENS[screen]), []
    page.route("**/v1/model", lambda route: held.append(route))
    page.goto(f"http://127.0.0.1:{service.port}/?label=star&seed=1")
    page.wait_for_selector("#empty-text")
    pressable = page.locator(":is(button, input, select, summary):visible:enabled")
    assert pressable.count() == 0
    page.wait_for_timeout(100)
    page.keyboard.press("Enter")
    assert pressable.count() == 0 and page.is_visible("text=Asking the service for its model…")
    assert not accessibility_faults(page)
    (request,) = held
    request.abort()
    page.wait_for_selector("#notice", state="visible")
    assert pressable.all_inner_texts() == ["Try again"]
    assert not accessibility_faults(page)
    page.unroute("**/v1/model")
    page.click("#again")
    finished(page)
    assert page.is_hidden("#notice")


@pytest.mark.parametrize("screen", SCREENS)
def test_axe_finds_nothing_wrong(visit: Visit, screen: str) -> None:
    page = visit("?label=star&label=none&seed=1&count=2", **SCREENS[screen])
    finished(page)
    faults = {"several": accessibility_faults(page)}
    page.click(".tile >> nth=0")
    faults["one"] = accessibility_faults(page)
    page.click("#gallery button >> nth=1")
    faults["older"] = accessibility_faults(page)
    page.click("#edit-this")
    page.wait_for_selector("#mask-editor", state="visible")
    if not page.evaluate("document.querySelector('#settings').open"):
        page.click("#settings summary")
    page.click("#generate")
    page.wait_for_selector("#notice", state="visible")
    faults["edit"] = accessibility_faults(page)
    assert not any(faults.values()), faults
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_axe_sees_a_fault(visit: Visit) -> None:
    page = visit()
    page.evaluate("document.querySelector('#count').labels[0].remove()")
    assert [fault.partition(":")[0] for fault in accessibility_faults(page)] == ["label"]


def test_everything_by_keyboard(visit: Visit) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")

    def tab_to(wanted: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({wanted!r})"):
                ring = page.evaluate(
                    """() => {
                      const element = document.activeElement;
                      const seen = element.matches("[type=radio]")
                        ? element.nextElementSibling : element;
                      return getComputedStyle(seen).outlineStyle;
                    }"""
                )
                assert ring == "solid", f"the focus on {wanted} is not seen"
                return
        raise AssertionError(f"{wanted} is not reached")

    tab_to("#chips input")
    page.keyboard.press("ArrowRight")
    tab_to("#generate")
    page.keyboard.press("Enter")
    finished(page)
    assert "heart" in page.inner_text("#caption")
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "count"
    page.evaluate("document.querySelector('.skip').focus()")
    tab_to("#strip button")
    page.keyboard.press("Enter")
    assert "After scale 1 of 3" in page.inner_text("#caption")
    tab_to("#edit-this")
    page.keyboard.press("Enter")
    page.wait_for_selector("#mask-editor", state="visible")
    for key in ("Shift+ArrowLeft", "Space"):  # the focus is on the mask
        page.keyboard.press(key)
    assert "is marked" in page.inner_text("#marked")
    tab_to("#region")
    page.keyboard.type("Left")
    assert page.inner_text("#marked") == "50 % is marked."
    tab_to("#generate")
    page.keyboard.press("Enter")
    finished(page)
    tab_to("#gallery button")
    page.keyboard.press("Enter")
    page.evaluate("document.querySelector('.skip').focus()")
    tab_to("#use-settings")


def test_everything_has_a_name(visit: Visit) -> None:
    page = visit("?label=star&seed=1&count=2")
    finished(page)
    page.click(".tile >> nth=0")
    page.click("#edit-this")
    page.wait_for_selector("#mask-editor", state="visible")
    page.click("#settings summary")
    tree = page.locator("body").aria_snapshot()
    roles = "button|link|radio|slider|spinbutton|combobox|checkbox|img|radiogroup|application"
    nameless = re.findall(rf"^\s*- (?:{roles})(?: \[.*|:)?$", tree, re.MULTILINE)
    assert not nameless
    assert 'slider "Guidance"' in tree
    assert 'button "star, seed 2"' in tree
    assert 'link "API"' in tree


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_it_fits(visit: Visit, width: int) -> None:
    page = visit("?label=star&seed=1", viewport={"width": width, "height": 800})
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click("#edit-this")
    page.wait_for_selector("#mask-editor", state="visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
