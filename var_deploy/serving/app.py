"""The HTTP service as an ASGI application: its routes, and the answer to each error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from var_deploy import __version__
from var_deploy.errors import (
    BackendError,
    UsageError,
    VarDeployError,
)
from var_deploy.labels.synonyms import class_synonyms
from var_deploy.pipeline import Pipeline
from var_deploy.serving import schemas
from var_deploy.serving.answers import as_json, as_png, as_text, plain_settings, png
from var_deploy.serving.backend import (
    Backend,
    Drawn,
    Event,
    GenerationRequest,
    Queued,
    RefusedError,
    ScaleDone,
)
from var_deploy.serving.bodies import (
    Body,
    BodyMemory,
    parse_body,
)
from var_deploy.serving.docs import docs_page
from var_deploy.serving.events import EventStream, GoneError, event, while_wanted
from var_deploy.serving.failures import BROKEN, add_handlers, reason
from var_deploy.serving.guard import GONE, IMAGES, Guard, body_limit
from var_deploy.serving.metrics import MEDIA_TYPE, Metrics
from var_deploy.serving.queue import LocalQueue
from var_deploy.serving.settings import Settings
from var_deploy.serving.validate import can_edit, validate_edit, validate_images, validate_vary
from var_deploy.spec import TextModelSpec
from var_deploy.text.examples import examples

PAGE = Path(__file__).parent / "page"
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



def create_app(
    backend: Pipeline | Backend,
    settings: Settings | None = None,
    *,
    name: str = "",
    metrics: Metrics | None = None,
) -> FastAPI:
    """Make the ASGI application of the service.

    Args:
        backend: generates the images. A `Pipeline` gets a queue of its own, must not be used by
            anything else meanwhile, and is closed by the caller.
        name: name of a model that is not a preset.
        metrics: those that a backend other than a pipeline writes to.

    The shutdown of the application waits for all accepted requests.
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
        openapi_url=None,  # served below, built once
        redirect_slashes=False,  # to an address made of the request's Host; see Guard
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        lifespan=lifespan,
    )
    app.state.backend, app.state.settings = backend, settings
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    add = app.add_api_route
    add("/v1/model", service.model, responses=FAILED, summary="What is served")
    edit = "Draw a part of a picture anew"
    vary = "Draw more images like a picture, from a scale on"
    for path, post, streamed, body, what in (
        ("/v1/images", service.images, service.images_stream, schemas.ImagesBody, "Draw images"),
        ("/v1/edit", service.edit, service.edit_stream, schemas.EditBody, edit),
        ("/v1/vary", service.vary, service.vary_stream, schemas.VaryBody, vary),
    ):
        options: dict[str, Any] = {"methods": ["POST"], "response_model": None}
        options["openapi_extra"] = _described_body(body)
        add(path, post, responses=DRAWN, summary=what, **options)
        options |= {"responses": STREAMED, "response_class": EventStream, "status_code": 200}
        add(f"{path}/stream", streamed, summary=f"{what}, and watch", **options)
    add("/health", service.health, response_model=None, summary="Whether new work is taken")
    add("/metrics", service.metrics_page, response_model=None, summary="For Prometheus")
    hidden: dict[str, Any] = {"include_in_schema": False, "response_model": None}
    openapi = _openapi(app)
    app.openapi = lambda: openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it
    html, description = docs_page(openapi, settings.root_path), json.dumps(openapi)
    add("/docs", lambda: HTMLResponse(html), **hidden)
    add(
        "/openapi.json", lambda: Response(description, media_type="application/json"), **hidden
    )
    add("/", _index, **hidden)
    if PAGE.is_dir():
        app.mount("/page", StaticFiles(directory=PAGE))
    add_handlers(app)
    return app


class Service:
    """Handlers of the routes; each method answers one."""

    def __init__(
        self, backend: Backend, settings: Settings, metrics: Metrics, name: str
    ) -> None:
        self.backend, self._settings, self._metrics = backend, settings, metrics
        self._manifest, self._how = backend.manifest, backend.describe()
        self._name = self._manifest.preset or name or "model"
        self._memory = BodyMemory(settings)
        self._unpacking = asyncio.Semaphore(1)  # pictures are large once they are unpacked

    async def model(self) -> schemas.ModelAnswer:
        manifest, spec = self._manifest, self._manifest.model
        names = ("count", "pixels", "prompt", "queue", "body")
        limits = {k: getattr(self._settings, k) for k in names}
        height, width = spec.tokenizer.image_size
        square = all(rows == columns for rows, columns in spec.grids)
        text = spec.transformer if isinstance(spec, TextModelSpec) else None
        conditional = spec.transformer.conditional
        return schemas.ModelAnswer(
            takes="prompts" if text is not None else "labels" if conditional else "nothing",
            text_length=text.text_length if text is not None else 0,
            examples=list(examples(manifest.preset)) if text is not None else [],
            height=height,
            width=width,
            grids=list(spec.grids),
            name=self._name,
            digest=manifest.digest(),
            side=height if height == width else None,
            channels=spec.tokenizer.image_channels,
            patch_nums=[rows for rows, _ in spec.grids] if square else None,
            scales=spec.scales,
            labels=list(manifest.labels) or None,
            synonyms=[list(others) for others in class_synonyms(manifest.labels)] or None,
            classes=spec.transformer.classes,
            codes=spec.tokenizer.token_values,
            conditional=conditional,
            guidance=manifest.guidance,
            defaults=schemas.Defaults.model_validate(plain_settings(manifest.defaults)),
            precision=self._precision,
            backend=self._how.backend,
            batch=manifest.batch,
            limits=schemas.LimitsAnswer.model_validate(limits),
            editing=can_edit(manifest, self._precision),
        )

    async def images(self, request: Request) -> Response:
        came = time.perf_counter()
        body, work = await self._asked_images(request)
        return await self._answer(request, body.format, work, came)

    async def images_stream(self, request: Request) -> Response:
        came = time.perf_counter()
        _, work = await self._asked_images(request, previews=True)
        return await self._stream(request, work, came)

    async def edit(self, request: Request) -> Response:
        came = time.perf_counter()
        answer_format, work = await self._asked_edit(request)
        return await self._answer(request, answer_format, work, came)

    async def edit_stream(self, request: Request) -> Response:
        came = time.perf_counter()
        _, work = await self._asked_edit(request, previews=True)
        return await self._stream(request, work, came)

    async def vary(self, request: Request) -> Response:
        came = time.perf_counter()
        answer_format, work = await self._asked_vary(request)
        return await self._answer(request, answer_format, work, came)

    async def vary_stream(self, request: Request) -> Response:
        came = time.perf_counter()
        _, work = await self._asked_vary(request, previews=True)
        return await self._stream(request, work, came)

    async def health(self) -> Response:
        if self.backend.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_page(self) -> Response:
        return Response(self._metrics.page(), media_type=MEDIA_TYPE)

    @property
    def _precision(self) -> str:
        return self._how.precision

    async def _asked_images(
        self, request: Request, previews: bool = False
    ) -> tuple[schemas.ImagesBody, GenerationRequest]:
        def ask(data: Body) -> tuple[schemas.ImagesBody, GenerationRequest]:
            body = _validated(schemas.ImagesBody, data, self._settings)
            return body, validate_images(body, self._manifest, self._settings, previews)

        limit = body_limit(request.scope, self._settings)
        async with self._memory.read(request.receive, limit) as data:
            return await asyncio.to_thread(ask, data)

    async def _asked_edit(
        self, request: Request, previews: bool = False
    ) -> tuple[str | None, GenerationRequest]:
        def ask(data: Body) -> tuple[str | None, GenerationRequest]:
            body = _validated(schemas.EditBody, data, self._settings)
            how = (self._precision, previews)
            return body.format, validate_edit(body, self._manifest, self._settings, *how)

        return await self._asked_picture(request, ask)

    async def _asked_vary(
        self, request: Request, previews: bool = False
    ) -> tuple[str | None, GenerationRequest]:
        def ask(data: Body) -> tuple[str | None, GenerationRequest]:
            body = _validated(schemas.VaryBody, data, self._settings)
            how = (self._precision, previews)
            return body.format, validate_vary(body, self._manifest, self._settings, *how)

        return await self._asked_picture(request, ask)

    async def _asked_picture(
        self, request: Request, ask: Callable[[Body], tuple[str | None, GenerationRequest]]
    ) -> tuple[str | None, GenerationRequest]:
        """Return the format of the answer and the request; the body, which is large, is freed."""
        limit = body_limit(request.scope, self._settings)
        async with self._memory.read(request.receive, limit) as data, self._unpacking:
            return await asyncio.to_thread(ask, data)

    async def _answer(
        self, request: Request, answer_format: str | None, work: GenerationRequest, came: float
    ) -> Response:
        try:
            drawn = await while_wanted(request.receive, self._drawn(work))
        except GoneError:
            return Response(status_code=GONE)  # the client is gone
        except RefusedError as error:
            self._count(error)
            raise
        accepts_png = "image/png" in request.headers.get("accept", "")
        request.scope[IMAGES] = work.count
        if answer_format == "png" or (answer_format is None and accepts_png):
            data = await asyncio.to_thread(as_png, self._manifest, self._precision, work, drawn)
            return Response(data, media_type="image/png", headers=_headers(work, drawn))
        answer = await asyncio.to_thread(self._answered, work, drawn, came)
        return Response(answer, media_type="application/json")

    async def _stream(self, request: Request, work: GenerationRequest, came: float) -> Response:
        events = self.backend.draw(work)
        try:
            first = await anext(events)  # a refusal is an answer of its own, with its status
        except RefusedError as error:
            self._count(error)
            raise
        request.scope[IMAGES] = work.count
        return EventStream(self._told(first, events, work, came))

    async def _told(
        self,
        first: Event,
        events: AsyncGenerator[Event, None],
        work: GenerationRequest,
        came: float,
    ) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(events):
            try:
                yield self._event(first, work, came)
                async for one in events:
                    yield await asyncio.to_thread(self._event, one, work, came)
            except VarDeployError as error:
                if isinstance(error, RefusedError):
                    self._count(error)
                yield event("error", schemas.ErrorAnswer(error=reason(error)).model_dump_json())
            except Exception:
                yield event("error", schemas.ErrorAnswer(error=BROKEN).model_dump_json())
                raise  # for the log

    def _event(self, one: Event, work: GenerationRequest, came: float) -> bytes:
        """Encode an event. Except for Queued this encodes PNGs, which takes too long for the event
        loop."""
        if isinstance(one, Queued):
            queued = schemas.QueuedEvent(position=one.position, seconds=self._expected(work))
            return event("queued", queued.model_dump_json())
        if isinstance(one, ScaleDone):
            return event("scale", _previews(one).model_dump_json())
        return event("done", self._answered(work, one, came))

    def _expected(self, work: GenerationRequest) -> float | None:
        """Expected seconds to generate the images of a request; None before the first batch."""
        batch = self._metrics.batch_seconds
        batches = math.ceil(work.count / self._manifest.batch)
        return None if batch is None else round(batches * batch, 3)

    def _answered(self, work: GenerationRequest, drawn: Drawn, came: float) -> str:
        """Return the `Answer` to a request as JSON."""
        seconds = time.perf_counter() - came
        return as_json(self._manifest, self._precision, work, drawn, seconds).model_dump_json()

    async def _drawn(self, work: GenerationRequest) -> Drawn:
        async with contextlib.aclosing(self.backend.draw(work)) as events:
            async for one in events:
                if isinstance(one, Drawn):
                    return one
        raise BackendError("the queue ended without an image")

    def _count(self, error: RefusedError) -> None:
        why = type(error).__name__.removesuffix("Error").lower()
        self._metrics.rejected.labels(reason=why).inc()


def _previews(done: ScaleDone) -> schemas.ScaleDoneEvent:
    images = [
        schemas.Preview(number=done.first + n, png=as_text(png(image, quick=True)))
        for n, image in enumerate(done.images)
    ]
    return schemas.ScaleDoneEvent(scale=done.scale, scales=done.scales, images=images)


def _headers(work: GenerationRequest, drawn: Drawn) -> dict[str, str]:
    seeds = [seed for seed, _ in work.request.rng_keys]
    return {
        "X-Seed": ",".join(map(str, seeds)),
        "X-Scales-Done": ",".join(map(str, drawn.scales_done)),
    }


async def _index() -> Response:
    if not (PAGE / "index.html").is_file():
        raise HTTPException(404, "this installation has no page; /docs describes the service")
    return FileResponse(PAGE / "index.html")


# request bodies


B = TypeVar("B", bound=schemas.Body)


def _validated(kind: type[B], data: Body, settings: Settings) -> B:
    """Parse and validate a body. Raises UsageError that names its first invalid field."""
    fields = parse_body(data, settings, schemas.PICTURES)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = (str(first["loc"][0]) or "''") if first["loc"] else "the body"
    what = "Input should be base64" if first["type"] == "is_instance_of" else first["msg"]
    raise UsageError(f"{where}: {what}")


# description of the routes


def _described_body(body: type[schemas.Body]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description, with the bodies, which the routes parse without FastAPI."""
    openapi = app.openapi()
    known = openapi["components"]["schemas"]
    for body in (schemas.ImagesBody, schemas.EditBody, schemas.VaryBody):
        known[body.__name__] = body.model_json_schema(ref_template="#/components/schemas/{model}")
    openapi["components"]["schemas"] = dict(sorted(known.items()))
    return openapi
