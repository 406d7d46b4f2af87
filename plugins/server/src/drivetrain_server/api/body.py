"""Reading what a client has sent, as suspiciously as it deserves."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from drivetrain_server.api.errors import ApiError

M = TypeVar("M", bound=BaseModel)
_DEEPEST = 64


async def read(request: Request, kind: type[M], *, most: int, seconds: float) -> M:
    """The request's body as ``kind``.

    Args:
        request: with JSON.
        kind: what it has to be.
        most: bytes.
        seconds: in which it has to arrive.

    Raises:
        ApiError: it is not; says what is wrong and where.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, "the content type of a request must be application/json")
    try:
        async with asyncio.timeout(seconds):
            data = await _bytes(request, most)
    except TimeoutError:
        raise ApiError(408, f"the request has not arrived within {seconds:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client has gone") from None
    return validated(_parsed(data), kind)


def validated(value: Any, kind: type[M]) -> M:
    """The value as ``kind``.

    Raises:
        ApiError: it is not.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not _is_choice(part)) or None
        if first["type"] == "extra_forbidden":
            raise ApiError(
                400, f"unknown field: {where}", param=where, code="unknown_parameter"
            ) from None
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{where}: {reason}" if where else reason
        raise ApiError(400, message[:1000], param=where, code="invalid_value") from None


def _is_choice(part: object) -> bool:
    """Whether pydantic names an alternative of a union, which no client knows."""
    return (isinstance(part, str) and not part.isidentifier()) or part in ("str", "int", "list")


async def _bytes(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        _too_long(most)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > most:
            _too_long(most)
    return bytes(data)


def _too_long(most: int) -> NoReturn:
    raise ApiError(413, f"the request has more than {most} bytes", code="request_too_large")


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
        if _depth_exceeds(value, _DEEPEST):
            raise ApiError(400, f"the request is nested more than {_DEEPEST} deep")
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the request is not UTF-8: byte {error.start}") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the request has half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ApiError(400, f"the request is nested more than {_DEEPEST} deep") from None
    except ValueError as error:
        raise ApiError(400, f"the request is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request must be a JSON object")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
