"""What stands in front of every request: who may ask, and from where."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drivetrain_server.api.errors import ApiError
from drivetrain_server.settings import LOOPBACK, Settings

_OPEN = ("/", "/live", "/health")
"""Paths that need no key: pages without anybody's data, and whether the server is there."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
}


class Guard:
    """Refuses requests without a key, and those that a web page sends in its visitor's name.

    A server at the loopback address may be reached by any page that its user's browser shows. Such
    requests name their origin, or, where a name was made to point here, another host.

    Args:
        app: what is guarded.
        settings: keys and origins.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope["path"], scope["method"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)

    def _check(self, path: str, method: str, headers: Headers) -> None:
        settings = self._settings
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if settings.host in LOOPBACK and not settings.api_keys and host not in LOOPBACK:
            raise ApiError(403, f"this server is for this machine, and not called {host[:100]!r}")
        origin = headers.get("origin")
        if origin is not None and not self._known(origin, headers.get("host", "")):
            raise ApiError(403, f"pages of {origin[:100]!r} may not call this server; see --cors")
        free = path in _OPEN or path.startswith("/static/") or method == "OPTIONS"
        if self._keys and not free:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode() if scheme.lower() == "bearer" else b""
            # All are compared, so that time tells nothing.
            if not sum(hmac.compare_digest(given, known) for known in self._keys):
                raise ApiError(
                    401,
                    "the API key is missing or wrong",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _known(self, origin: str, host: str) -> bool:
        allowed = self._settings.cors
        return "*" in allowed or origin in allowed or urlsplit(origin).netloc == host
