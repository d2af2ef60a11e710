"""Steps on the page, for the tests that drive it in a browser."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving.client import Client

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")

Pixels = NDArray[np.uint8]
Visit = Callable[..., Any]


@contextmanager
def started() -> Iterator[Any]:
    """A browser without a screen; skips where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed, so no browser can be driven"
    )
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(PROGRAMS)}")
    with playwright.sync_playwright() as driver:
        # in a container Chromium's own sandbox cannot be set up
        yield driver.chromium.launch(executable_path=program, args=["--no-sandbox"])


@contextmanager
def visitors(browser: Any, service: Client) -> Iterator[Visit]:
    """Opens the page, at a query, as a visitor of its own; no script may fail on it, and nobody
    but the service may be asked for anything. Options are those of a browser context, and `to`,
    another service."""
    contexts, wrong = [], []

    def begin(query: str = "", *, ready: bool = True, to: Client = service, **options: Any) -> Any:
        address = f"http://127.0.0.1:{to.port}"

        def asked(request: Any) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                wrong.append(request.url)

        contexts.append(browser.new_context(reduced_motion="reduce", **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        if ready:
            open_page(page, f"{address}/{query}")
        return page

    yield begin
    for context in contexts:
        context.close()
    assert not wrong


def open_page(page: Any, address: str) -> None:
    """Return once the page can be used and has read its history."""
    page.goto(address)
    page.wait_for_selector("body[data-ready][data-history]")


def finished(page: Any) -> None:
    page.wait_for_selector("#panel[aria-busy=false]")
    page.wait_for_selector("#actions", state="visible")


def generate(page: Any, label: str, seed: int, count: int = 1) -> None:
    page.get_by_text(label, exact=True).click()
    page.fill("#seed", str(seed))
    page.fill("#count", str(count))
    page.click("#generate")
    finished(page)


def shown(page: Any) -> list[Pixels]:
    """Pictures that are looked at, in order."""
    sources = page.eval_on_selector_all(
        ".tile:not([hidden]) img:not(.former)", "images => images.map(image => image.src)"
    )
    return [pixels(source) for source in sources]


def pixels(url: str) -> Pixels:
    with Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as image:
        return np.asarray(image.convert("RGB"), np.uint8)


def file(colour: tuple[int, int, int], width: int, height: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "png")
    return {"name": "mine.png", "mimeType": "image/png", "buffer": stream.getvalue()}


def expected(service: Client, label: str | None, seed: int) -> Pixels:
    labels = None if label is None else [label]
    return service.post("/v1/images", {"labels": labels, "seed": seed}).images()[0]


def query(page: Any) -> str:
    return urlsplit(page.url).query


def focused(page: Any) -> str:
    """The id of the element that has the focus."""
    found: str = page.evaluate("document.activeElement.id")
    return found


def accessibility_faults(page: Any) -> list[str]:
    """What axe finds wrong, as "rule: element". Skips where axe is not installed."""
    pytest.importorskip(
        "axe_playwright_python", reason="axe-playwright-python is not installed, so no axe"
    )
    script = resources.files("axe_playwright_python").joinpath("axe.min.js")
    if not page.evaluate("'axe' in window"):
        page.evaluate(script.read_text("utf-8"))
    violations = page.evaluate("axe.run().then(found => found.violations)")
    return [f"{one['id']}: {node['html']}" for one in violations for node in one["nodes"]]
