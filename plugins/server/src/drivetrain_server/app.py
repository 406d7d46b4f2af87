"""The application: paths, errors, what stands in front."""

from __future__ import annotations

import logging
import time
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drivetrain_server.api.adapters import Adapters
from drivetrain_server.api.chat import Chat
from drivetrain_server.api.completions import Completions
from drivetrain_server.api.embeddings import Embeddings
from drivetrain_server.api.errors import ApiError, as_api_error
from drivetrain_server.api.generation import Generator
from drivetrain_server.api.guard import Guard
from drivetrain_server.metrics import Metrics
from drivetrain_server.settings import Settings
from drivetrain_server.templates.renderer import Renderer
from drivetrain_server.workers.router import Router

logger = logging.getLogger("drivetrain.server")

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def create_app(
    settings: Settings, router: Router, renderer: Renderer | None, metrics: Metrics
) -> ASGIApp:
    """The application of a server whose workers have started.

    Args:
        settings: limits, keys, names.
        router: takes requests to workers.
        renderer: of chat templates; ``None`` if the model has none.
        metrics: what is counted.
    """
    generator = Generator(settings, router, metrics)
    others = _Others(settings, router, metrics, chat=renderer is not None)
    chat, completions = Chat(generator, renderer), Completions(generator)
    routes = [
        Route("/v1/chat/completions", _post(chat), methods=["POST"]),
        Route("/v1/completions", _post(completions), methods=["POST"]),
        Route("/v1/embeddings", _post(Embeddings(generator)), methods=["POST"]),
        Route("/v1/adapters/{name}", _post(Adapters(router.exchange)), methods=["POST", "DELETE"]),
        Route("/v1/models", others.models),
        Route("/v1/models/{name:path}", others.model),
        Route("/health", others.health),
        Route("/metrics", others.metrics),
        Route("/live/status", others.status),
        Route("/", _page("chat.html")),
        Route("/live", _page("live.html")),
        Route("/static/{name}", _static),
    ]
    middleware = []
    if settings.cors:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    handlers: dict[Any, Any] = {
        HTTPException: _http_error,
        ClientDisconnect: lambda request, error: Response(status_code=499),
        Exception: lambda request, error: as_api_error(error).response(),
    }

    def ours(request: Request, error: Exception) -> Response:
        return as_api_error(error, router.retry_after()).response()

    for kind in others.errors:
        handlers[kind] = ours
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    return Guard(_Counted(app, metrics, {route.path for route in routes}), settings)


class _Others:
    """Everything that generates nothing."""

    def __init__(self, settings: Settings, router: Router, metrics: Metrics, *, chat: bool) -> None:
        from drivetrain_server.templates.sandbox import BadTemplateError
        from drivetrain_server.workers.tickets import RefusedError, WorkerLostError

        self.errors = (ApiError, RefusedError, WorkerLostError, BadTemplateError)
        self._settings, self._router, self._metrics, self._chat = settings, router, metrics, chat
        self._began = time.time()

    async def models(self, request: Request) -> Response:
        names = [self._settings.name, *self._router.shelf.paths]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._settings.name and name not in self._router.shelf.paths:
            raise ApiError(
                404, f"there is no model {name[:200]!r} here", param="model", code="model_not_found"
            )
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "parent": None if name == self._settings.name else self._settings.name,
            "object": "model",
            "created": int(self._began),
            "owned_by": "drivetrain",
            "max_model_len": self._router.facts.get("capacity"),
            "chat": self._chat,
        }

    async def health(self, request: Request) -> Response:
        workers = [
            {
                "worker": each.index,
                "ready": each.ready,
                "restarts": each.restarts,
                "trouble": each.trouble,
            }
            for each in self._router.replicas
        ]
        ready = [each["ready"] for each in workers]
        state = "ok" if all(ready) else "degraded" if any(ready) else "down"
        return JSONResponse({"status": state, "workers": workers}, 200 if any(ready) else 503)

    async def metrics(self, request: Request) -> Response:
        for replica in self._router.replicas:
            known = {"up": float(replica.ready), "restarts": replica.restarts, **replica.status}
            for name, gauge in self._metrics.gauges.items():
                gauge.labels(str(replica.index)).set(known.get(name, 0.0))
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def status(self, request: Request) -> Response:
        metrics = self._metrics
        workers = [
            {
                "worker": each.index,
                "process": each.facts.get("process"),
                "ready": each.ready,
                "restarts": each.restarts,
                **each.status,
            }
            for each in self._router.replicas
        ]
        return JSONResponse(
            {
                "model": self._settings.name,
                "seconds": time.time() - self._began,
                "capacity": self._router.facts.get("capacity"),
                "open": self._router.load,
                "most_open": self._settings.max_open,
                "tokens_per_second": metrics.tokens_per_second(),
                "first_token_seconds": metrics.median_first_token(),
                "tokens": metrics.total,
                "workers": workers,
            }
        )


class _Counted:
    """Counts requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _post(handler: Adapters | Chat | Completions | Embeddings) -> Any:
    async def handle(request: Request) -> Response:
        return await handler(request)

    return handle


def _http_error(request: Request, error: HTTPException) -> Response:
    message = {
        404: f"there is nothing at {request.url.path[:200]}",
        405: "another method is needed",
    }
    return ApiError(error.status_code, message.get(error.status_code, error.detail)).response()


def _page(name: str) -> Any:
    text = (resources.files("drivetrain_server") / "pages" / name).read_bytes()

    async def show(request: Request) -> Response:
        return Response(text, media_type="text/html; charset=utf-8")

    return show


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    kind = _KINDS.get(name.rpartition(".")[2])
    folder = resources.files("drivetrain_server") / "pages"
    if kind is None or name not in {each.name for each in folder.iterdir()}:
        raise HTTPException(404)
    return Response(
        (folder / name).read_bytes(),
        media_type=f"{kind}; charset=utf-8",
        headers={"Cache-Control": "no-cache"},
    )
