"""A small model as a service."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving.browser import Visit, started, visitors
from serving.client import PATIENCE, Client, running

from var_deploy.pipeline import Pipeline

NAMES = ("star", "heart", "house", "tree", "fish")
LIMITS = {"queue": 4, "count": 6, "pixels": 10_000, "body": 100_000}

Start = Callable[..., Client]


@pytest.fixture(scope="session")
def small_bundle(
    tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]
) -> Path:
    """Two images a launch, three scales, images of 8 × 8 and names for five classes."""
    pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")
    from var_deploy.export.bundle import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("served") / "bundle"
    model = dataclasses.replace(small_model(), labels=NAMES)
    export_bundle(model, out, ExportOptions(batch=2, layout="shared"))
    return out


@pytest.fixture(scope="module")
def pipe(small_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture
def start(pipe: Pipeline) -> Iterator[Start]:
    """Starts a service with its own limits."""
    from var_deploy.serving.app import create_app
    from var_deploy.serving.settings import Settings

    with ExitStack() as stack:

        def begin(**limits: Any) -> Client:
            app = create_app(pipe, Settings(**{**LIMITS, **limits}))
            return stack.enter_context(running(app))

        yield begin


@pytest.fixture(scope="module")
def service(pipe: Pipeline) -> Iterator[Client]:
    """One service for all tests of a module that leave it as it was."""
    from var_deploy.serving.app import create_app
    from var_deploy.serving.settings import Settings

    with running(create_app(pipe, Settings(**LIMITS), name="small")) as client:
        yield client


class Gate:
    """Holds drawing up, so that a test can see who waits."""

    def __init__(self) -> None:
        self.batches: list[Any] = []  # the requests that came to be drawn
        self._reached, self._open = threading.Semaphore(0), threading.Semaphore(0)

    def pass_through(self, request: Any) -> None:
        self.batches.append(request)
        self._reached.release()
        assert self._open.acquire(timeout=PATIENCE)

    def reached(self) -> None:
        """Return once another batch stands at the gate."""
        assert self._reached.acquire(timeout=PATIENCE), "nothing was drawn"

    def let_go(self, batches: int = 1) -> None:
        self._open.release(batches)


@pytest.fixture
def gate(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held, draw = Gate(), pipe.draw

    def wait(request: Any, *arguments: Any, **options: Any) -> Any:
        held.pass_through(request)
        return draw(request, *arguments, **options)

    monkeypatch.setattr(pipe, "draw", wait)
    yield held
    held.let_go(1000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a screen."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    with started() as program:
        yield program


@pytest.fixture
def visit(browser: Any, service: Client) -> Iterator[Visit]:
    """Opens the page of `service`, see `browser.visitors`."""
    with visitors(browser, service) as begin:
        yield begin
