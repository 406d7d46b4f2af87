"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from starlette.responses import JSONResponse

from drivetrain_server.templates.sandbox import BadTemplateError
from drivetrain_server.workers.tickets import RefusedError, WorkerLostError

logger = logging.getLogger("drivetrain.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "server_error",
}


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        message: one phrase.
        param: the field that is wrong.
        code: a word for programs.
        headers: that come with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The error as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def as_api_error(error: Exception, retry_after: int = 1) -> ApiError:
    """What a client is told of an error of ours; of others, only that there was one."""
    later = {"Retry-After": str(retry_after)}
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RefusedError):
        headers = later if error.status == 429 else None
        return ApiError(error.status, str(error), code=error.code, headers=headers)
    if isinstance(error, WorkerLostError):
        return ApiError(503, str(error), code="worker_lost", headers=later)
    if isinstance(error, BadTemplateError):
        return ApiError(400, str(error), param="messages", code="template_error")
    logger.error("a request has failed", exc_info=error)
    return ApiError(500, "the server has failed; its log says why", code="internal_error")
