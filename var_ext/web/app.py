"""The web application: the page, what the model is, and four requests answered by a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from var_ext import editing
from var_ext.sampling import Sampler
from var_ext.web.drawing import Drawing, Events
from var_ext.web.guard import Guard
from var_ext.web.limits import Limits
from var_ext.web.queue import DrawQueue, Event, Full, Job
from var_ext.web.requests import OPTIONS, Reader

STATIC = Path(__file__).parent / "static"
FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}


class TooLarge(Exception):
    """The body of a request has more bytes than it may."""


def make_app(
    sampler: Sampler, name: str, limits: Limits | None = None, *, loopback_only: bool = True
) -> Starlette:
    """The application of a model, for any ASGI server.

    Args:
        sampler: the model.
        name: what the page calls it.
        limits: bounds of requests; None: the defaults.
        loopback_only: answer only requests that name this machine's loopback, so that no web site can reach it through
            a name of its own.
    """
    limits = limits or Limits()
    drawing = Drawing(sampler)
    reader = Reader(sampler, drawing.precisions, limits)
    queue = DrawQueue(limits.waiting)
    most = limits.body_bytes(sampler.image_size)

    def draws(read: Callable[[Any], Any], work: Callable[[Any], Events]) -> Callable[..., Any]:
        async def answer(http: HttpRequest) -> Response:
            try:
                body = await asyncio.wait_for(_body(http, most), limits.body_seconds)
                request = read(json.loads(body))
            except TooLarge:
                return _refused(413, f"a request must have at most {most} bytes")
            except (TimeoutError, asyncio.TimeoutError):
                return _refused(408, f"a request must come within {limits.body_seconds:g} s: send it again")
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
                return _refused(422, "a request must be a JSON object, got other text")
            except ValueError as error:
                return _refused(422, str(error))
            events: asyncio.Queue[Event | None] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def emit(event: Event | None) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(events.put_nowait, event)

            job = Job(lambda: work(request), emit)
            try:
                queue.submit(job)
            except Full:
                told = f"{limits.waiting} requests wait already: try again in a few seconds"
                return _refused(503, told, {"Retry-After": "5"})
            return Answer(_lines(events), lambda: queue.cancel(job))

        return answer

    async def model(_: HttpRequest) -> Response:
        return JSONResponse(
            {
                "name": name,
                "classes": sampler.class_names,
                "side": sampler.image_size,
                "scales": sampler.vae.schedule.patch_nums,
                "precision": sampler.precision.name,
                "precisions": drawing.precisions,
                "device": str(sampler.device),
                "codes": reader.codes,
                "defaults": {**{option: 1 for option in OPTIONS}, **sampler.defaults},
                "editing": {**{option: 1 for option in OPTIONS}, **editing.DEFAULTS},
                "limits": {"images": limits.images, "cfg": limits.cfg, "temperature": limits.temperature},
            }
        )

    def file(name: str) -> Callable[..., Any]:
        async def answer(_: HttpRequest) -> Response:
            return FileResponse(STATIC / name, headers={"Cache-Control": "no-cache"})

        return answer

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(queue.close)

    routes = [Route(path, file(name)) for path, name in FILES.items()]
    routes.append(Route("/api/model", model))
    for what in ("draw", "edit", "compare", "batch"):
        answer = draws(getattr(reader, what), getattr(drawing, what))
        routes.append(Route(f"/api/{what}", answer, methods=["POST"]))
    app = Starlette(
        routes=routes, lifespan=lifespan, middleware=[Middleware(Guard, loopback_only=loopback_only)]
    )
    app.state.queue = queue
    return app


async def _body(http: HttpRequest, most: int) -> bytes:
    length = http.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise TooLarge
    parts, size = [], 0
    async for part in http.stream():  # chunks need not say how many come
        size += len(part)
        if size > most:
            raise TooLarge
        parts.append(part)
    return b"".join(parts)


async def _lines(events: asyncio.Queue[Event | None]) -> AsyncIterator[bytes]:
    """Events as lines of JSON until the end."""
    while (event := await events.get()) is not None:
        yield json.dumps(event).encode() + b"\n"


class Answer(StreamingResponse):
    """A stream of lines; `left` is called at its end or when the client is gone, even before the first line."""

    def __init__(self, lines: AsyncIterator[bytes], left: Callable[[], None]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


def _refused(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"message": message}, status, headers)
