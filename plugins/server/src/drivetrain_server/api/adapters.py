"""``/v1/adapters``: adapters that are loaded and forgotten while the server runs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from drivetrain.errors import ConfigError
from drivetrain_server.api.errors import ApiError
from drivetrain_server.workers.router import Router


class Adapters:
    """Loads and forgets adapters by name, on every worker.

    Args:
        router: its workers, and the folder of adapters.
    """

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, request: Request) -> Response:
        name = request.path_params["name"]
        shelf = self._router.shelf
        if request.method == "DELETE":
            if name not in shelf.paths:
                raise ApiError(404, f"there is no adapter {name[:200]!r}", code="model_not_found")
            del shelf.paths[name]
            await self._router.set_adapter(name, "")
            return JSONResponse({"id": name, "object": "adapter", "deleted": True})
        try:
            path = shelf.path(name)
        except ConfigError as error:
            raise ApiError(404, str(error), code="model_not_found") from error
        await self._router.set_adapter(name, path)
        shelf.paths[name] = path
        return JSONResponse({"id": name, "object": "adapter", "deleted": False})
