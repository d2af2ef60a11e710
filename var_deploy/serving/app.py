"""The service as an ASGI application: routes, and what each error becomes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from var_deploy import __version__
from var_deploy.errors import BackendError, CancelledError, UsageError, VarDeployError
from var_deploy.pipeline import Pipeline
from var_deploy.serving import schemas
from var_deploy.serving.answers import as_json, as_png, as_text, plain_settings, png
from var_deploy.serving.ask import TooLargeError, ask_edit, ask_images, can_edit
from var_deploy.serving.backend import (
    Backend,
    Drawn,
    Event,
    Queued,
    RefusedError,
    ScaleDone,
    Work,
)
from var_deploy.serving.docs import docs_page
from var_deploy.serving.events import EventStream, GoneError, event, while_wanted
from var_deploy.serving.guard import Guard
from var_deploy.serving.metrics import MEDIA_TYPE, Metrics
from var_deploy.serving.queue import LocalQueue
from var_deploy.serving.settings import Settings

PAGE = Path(__file__).parent / "page"
LONGEST_ERROR = 500  # characters: a message may repeat what was sent
FAILED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorAnswer, "description": "Not drawn, for a reason it gives."},
    "5XX": {"model": schemas.ErrorAnswer, "description": "Could not be drawn."},
}
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {
        "model": schemas.Answer,
        "content": {"image/png": {}},
        "description": "The images; or one PNG, a grid where there are several.",
    },
    **FAILED,
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": schemas.QueuedEvent
        | schemas.ScaleDoneEvent
        | schemas.Answer
        | schemas.ErrorAnswer,
        "description": "Events: queued, scale after each scale, then done or error.",
    },
    **FAILED,
}
BROKEN = "internal error; the server's log says more"


def create_app(
    backend: Pipeline | Backend,
    settings: Settings | None = None,
    *,
    name: str = "",
    metrics: Metrics | None = None,
) -> FastAPI:
    """The service. A `Pipeline` gets a queue of its own, and may not be used otherwise meanwhile.

    `name` is what the model is called where it is no preset. `metrics` are those that a backend
    other than a pipeline tells. The end of the application's life waits for what was taken;
    closing the pipeline is the caller's.
    """
    settings, metrics = settings or Settings(), metrics or Metrics()
    if isinstance(backend, Pipeline):
        backend = LocalQueue(backend, settings.queue, metrics)
    service = Service(backend, settings, metrics, name)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.backend.stop()

    app = FastAPI(
        title="var-deploy",
        version=__version__,
        description="Images from a VAR bundle. The same seed gives the same image.",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.backend = backend
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    add = app.add_api_route
    add("/v1/model", service.model, responses=FAILED, summary="What is served")
    for path, post, streamed, what in (
        ("/v1/images", service.images, service.images_stream, "Draw images"),
        ("/v1/edit", service.edit, service.edit_stream, "Draw a part of a picture anew"),
    ):
        options: dict[str, Any] = {"methods": ["POST"], "response_model": None}
        add(path, post, responses=DRAWN, summary=what, **options)
        options |= {"responses": STREAMED, "response_class": EventStream, "status_code": 200}
        add(f"{path}/stream", streamed, summary=f"{what}, and watch", **options)
    add("/health", service.health, response_model=None, summary="Whether new work is taken")
    add("/metrics", service.metrics_page, response_model=None, summary="For Prometheus")
    hidden: dict[str, Any] = {"include_in_schema": False, "response_model": None}
    add("/docs", lambda: HTMLResponse(docs_page(app.openapi())), **hidden)
    add("/", _index, **hidden)
    if PAGE.is_dir():
        app.mount("/page", StaticFiles(directory=PAGE))
    handlers: tuple[tuple[type[Exception], Any], ...] = (
        (VarDeployError, _refused),
        (RequestValidationError, _malformed),
        (HTTPException, _http_error),
        (Exception, _broken),
    )
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)
    return app


class Service:
    """The routes."""

    def __init__(
        self, backend: Backend, settings: Settings, metrics: Metrics, name: str
    ) -> None:
        self.backend, self._settings, self._metrics = backend, settings, metrics
        self._manifest, self._how = backend.manifest, backend.describe()
        self._name = self._manifest.preset or name or "model"
        self._unpacking = asyncio.Semaphore(1)  # pictures are large once they are unpacked

    async def model(self) -> schemas.ModelAnswer:
        manifest, spec = self._manifest, self._manifest.model
        limits = {k: getattr(self._settings, k) for k in ("count", "pixels", "queue", "body")}
        return schemas.ModelAnswer(
            name=self._name,
            digest=manifest.digest(),
            side=spec.tokenizer.image_side,
            channels=spec.tokenizer.image_channels,
            patch_nums=list(spec.patch_nums),
            scales=spec.scales,
            labels=list(manifest.labels) or None,
            classes=spec.transformer.classes,
            conditional=spec.transformer.conditional,
            guidance=manifest.guidance,
            defaults=schemas.Defaults.model_validate(plain_settings(manifest.defaults)),
            precision=self._precision,
            backend=self._how.get("backend", "unknown"),
            batch=manifest.batch,
            limits=schemas.LimitsAnswer.model_validate(limits),
            editing=can_edit(manifest, self._precision),
        )

    async def images(self, request: Request, body: schemas.ImagesBody) -> Response:
        came = time.perf_counter()
        work = ask_images(body, self._manifest, self._settings)
        return await self._answer(request, body, work, came)

    async def images_stream(self, body: schemas.ImagesBody) -> Response:
        came = time.perf_counter()
        work = ask_images(body, self._manifest, self._settings, previews=True)
        return await self._stream(work, came)

    async def edit(self, request: Request, body: schemas.EditBody) -> Response:
        came = time.perf_counter()
        return await self._answer(request, body, await self._ask_edit(body), came)

    async def edit_stream(self, body: schemas.EditBody) -> Response:
        came = time.perf_counter()
        return await self._stream(await self._ask_edit(body, previews=True), came)

    async def health(self) -> Response:
        if self.backend.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_page(self) -> Response:
        return Response(self._metrics.page(), media_type=MEDIA_TYPE)

    @property
    def _precision(self) -> str:
        return self._how["precision"]

    async def _ask_edit(self, body: schemas.EditBody, previews: bool = False) -> Work:
        async with self._unpacking:
            return await asyncio.to_thread(
                ask_edit, body, self._manifest, self._settings, self._precision, previews
            )

    async def _answer(
        self, request: Request, body: schemas.Body, work: Work, came: float
    ) -> Response:
        try:
            drawn = await while_wanted(request.receive, self._drawn(work))
        except GoneError:
            return Response(status_code=499)  # which nobody reads
        except RefusedError as error:
            self._count(error)
            raise
        accepts_png = "image/png" in request.headers.get("accept", "")
        if body.format == "png" or (body.format is None and accepts_png):
            data = await asyncio.to_thread(as_png, self._manifest, self._precision, work, drawn)
            return Response(data, media_type="image/png", headers=_headers(work, drawn))
        answer = await self._answered(work, drawn, came)
        return Response(answer.model_dump_json(), media_type="application/json")

    async def _stream(self, work: Work, came: float) -> Response:
        events = self.backend.draw(work)
        try:
            first = await anext(events)  # a refusal is an answer of its own, with its status
        except RefusedError as error:
            self._count(error)
            raise
        return EventStream(self._told(first, events, work, came))

    async def _told(
        self, first: Event, events: AsyncGenerator[Event, None], work: Work, came: float
    ) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(events):
            try:
                yield event("queued", await self._message(first, work, came))
                async for one in events:
                    kind = {Queued: "queued", ScaleDone: "scale", Drawn: "done"}[type(one)]
                    yield event(kind, await self._message(one, work, came))
            except VarDeployError as error:
                if isinstance(error, RefusedError):
                    self._count(error)
                yield event("error", schemas.ErrorAnswer(error=_line(error)))
            except Exception:
                yield event("error", schemas.ErrorAnswer(error=BROKEN))
                raise  # for the log

    async def _message(
        self, one: Event, work: Work, came: float
    ) -> schemas.QueuedEvent | schemas.ScaleDoneEvent | schemas.Answer:
        if isinstance(one, Queued):
            return schemas.QueuedEvent(position=one.position)
        if isinstance(one, ScaleDone):
            return await asyncio.to_thread(_previews, one)
        return await self._answered(work, one, came)

    async def _answered(self, work: Work, drawn: Drawn, came: float) -> schemas.Answer:
        seconds = time.perf_counter() - came
        return await asyncio.to_thread(
            as_json, self._manifest, self._precision, work, drawn, seconds
        )

    async def _drawn(self, work: Work) -> Drawn:
        async with contextlib.aclosing(self.backend.draw(work)) as events:
            async for one in events:
                if isinstance(one, Drawn):
                    return one
        raise BackendError("the queue ended without an image")

    def _count(self, error: RefusedError) -> None:
        reason = type(error).__name__.removesuffix("Error").lower()
        self._metrics.rejected.labels(reason=reason).inc()


def _previews(done: ScaleDone) -> schemas.ScaleDoneEvent:
    images = [
        schemas.Preview(number=done.first + n, png=as_text(png(image, quick=True)))
        for n, image in enumerate(done.images)
    ]
    return schemas.ScaleDoneEvent(scale=done.scale, scales=done.scales, images=images)


def _headers(work: Work, drawn: Drawn) -> dict[str, str]:
    seeds = dict.fromkeys(seed for seed, _ in work.request.streams)
    return {
        "X-Seed": ",".join(map(str, seeds)),
        "X-Scales-Done": ",".join(map(str, drawn.scales_done)),
    }


async def _index() -> Response:
    if not (PAGE / "index.html").is_file():
        raise HTTPException(404, "this installation has no page; /docs describes the service")
    return FileResponse(PAGE / "index.html")


# errors


def _line(error: object) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_ERROR else text[:LONGEST_ERROR] + "…"
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text


async def _refused(request: Request, error: VarDeployError) -> Response:
    status, headers = 500, {}
    if isinstance(error, RefusedError):
        status = error.status
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    elif isinstance(error, TooLargeError):
        status = 413
    elif isinstance(error, UsageError):
        status = 400
    elif isinstance(error, CancelledError):
        status = 503
    return JSONResponse({"error": _line(error)}, status, headers)


async def _malformed(request: Request, error: RequestValidationError) -> Response:
    """A body that is no JSON, or whose values have the wrong types: the first thing wrong."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse({"error": "the body is no JSON"}, 400)
    where = ".".join(str(part) for part in first["loc"][1:2]) or "the body"
    return JSONResponse({"error": _line(f"{where}: {first['msg']}")}, 400)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": _line(error.detail)}, error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    """Nobody thought of this one: it goes on to the server's log."""
    return JSONResponse({"error": BROKEN}, 500)
