"""A server from start to end: workers, socket, what runs when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import FrameType, TracebackType

import uvicorn

from drivetrain.errors import ConfigError
from drivetrain_server.app import create_app
from drivetrain_server.metrics import Metrics
from drivetrain_server.settings import LOOPBACK, Settings
from drivetrain_server.templates.renderer import Renderer
from drivetrain_server.workers.router import Router

logger = logging.getLogger("drivetrain.server")


async def serve(
    settings: Settings,
    begun: Callable[[uvicorn.Server, str, Router], None] = lambda server, url, router: None,
) -> None:
    """Serve until told to stop, by a signal or by ``server.should_exit``.

    It listens only when all workers serve. At the end no new request is taken, and those that run
    have ``drain_seconds`` to finish.

    Args:
        settings: what to serve, and where.
        begun: called when it listens, with what stops it, its address and its workers.

    Raises:
        ConfigError: the model or the address cannot be served.
    """
    listening = _listening(settings)
    metrics = Metrics()
    router = Router(_with_threads(settings), metrics.heard)
    renderer = None
    try:
        await router.started()
        facts = router.facts
        template = settings.chat_template or facts.get("template")
        if template:
            renderer = Renderer(template, facts.get("tokens", {}), settings.template_seconds)
        config = uvicorn.Config(
            create_app(settings, router, renderer, metrics),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(settings.drain_seconds),
            backlog=2048,
        )
        server = _Server(config, router.close)
        begun(server, _url(settings, listening), router)
        await server.serve(sockets=[listening])
    finally:
        listening.close()
        await router.close()
        if renderer is not None:
            await renderer.close()


class _Server(uvicorn.Server):
    """Lets requests finish at the first signal, and at a second one ends them, whichever it is.

    Args:
        config: of uvicorn.
        ended: called when requests have ended. Signals are raised again right after, which ends
            this process, so nothing that has to be done may come later.
    """

    def __init__(
        self, config: uvicorn.Config, ended: Callable[[], Coroutine[None, None, None]]
    ) -> None:
        super().__init__(config)
        self._ended = ended

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for requests, and then end what has computed them."""
        await super().shutdown(sockets)
        await self._ended()


class Server:
    """A server in a thread of this process, for programs and tests.

    Args:
        settings: what to serve.

    Attributes:
        url: where it listens.
        router: its workers; only for the thread of the server.

    Raises:
        ConfigError: the model or the address cannot be served.
    """

    router: Router

    def __init__(self, settings: Settings) -> None:
        self.url = ""
        self._settings = settings
        self._server: uvicorn.Server | None = None
        self._error: BaseException | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        self._begun.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop; requests that run are finished."""
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        def begun(server: uvicorn.Server, url: str, router: Router) -> None:
            self._server, self.url, self.router = server, url, router
            self._begun.set()

        try:
            asyncio.run(serve(self._settings, begun))
        except BaseException as error:
            if self._begun.is_set():
                logger.exception("the server has failed")
            self._error = error
        self._begun.set()


def _listening(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen at {settings.host} port {settings.port}: {error.strerror}; "
            "choose another --port"
        ) from error
    return listening


def _url(settings: Settings, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    host = "localhost" if settings.host in LOOPBACK and ":" in settings.host else settings.host
    return f"http://{host}:{port}"


def _with_threads(settings: Settings) -> Settings:
    processes = settings.replicas * settings.ranks
    if settings.threads or processes == 1:
        return settings
    cores = os.cpu_count() or 1
    with contextlib.suppress(AttributeError):
        cores = len(os.sched_getaffinity(0))
    return replace(settings, threads=max(1, cores // processes))


__all__ = ["Server", "serve"]
