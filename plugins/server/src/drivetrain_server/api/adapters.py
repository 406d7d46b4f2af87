"""``/v1/adapters``: adapters that are loaded and forgotten while the server runs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from drivetrain.errors import ConfigError
from drivetrain_server.api.errors import ApiError
from drivetrain_server.workers.exchange import Exchange


class Adapters:
    """Loads and forgets adapters by name, on every worker.

    Args:
        exchange: changes the workers, and which adapters of the folder there are.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def __call__(self, request: Request) -> Response:
        name = request.path_params["name"]
        deleted = request.method == "DELETE"
        try:
            await (self._exchange.forget(name) if deleted else self._exchange.load(name))
        except ConfigError as error:
            raise ApiError(404, str(error), code="model_not_found") from error
        return JSONResponse({"id": name, "object": "adapter", "deleted": deleted})
