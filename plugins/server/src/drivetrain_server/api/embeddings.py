"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64
import struct
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from drivetrain_server.api.body import read
from drivetrain_server.api.errors import ApiError
from drivetrain_server.api.generation import Generation, Generator
from drivetrain_server.api.schemas import EmbeddingRequest
from drivetrain_server.api.streams import unless_gone

MOST_TEXTS = 2048
"""Texts of a request, as the protocol has it."""


class Embeddings:
    """Makes vectors of texts.

    Args:
        generator: knows the limits and takes requests to workers.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def __call__(self, request: Request) -> Response:
        generator = self._generator
        settings = generator.settings
        asked = await read(
            request, EmbeddingRequest, most=settings.max_body, seconds=settings.body_seconds
        )
        generator.check_model(asked.model)
        prompts = asked.prompts
        if not prompts or not all(prompts):
            raise ApiError(400, "a text is empty", param="input", code="invalid_value")
        if len(prompts) > MOST_TEXTS:
            why = f"the request has {len(prompts)} texts, and at most {MOST_TEXTS} may come at once"
            raise ApiError(400, why, param="input", code="invalid_value")
        if asked.dimensions is not None:
            raise ApiError(
                400,
                "this model makes vectors of one length",
                param="dimensions",
                code="invalid_value",
            )
        generator.router.admit(1)
        order = {"do": "embed", "prompts": prompts}
        ticket = generator.router.submit(order, 1)
        try:
            await unless_gone(request, ticket.begun())
            generation = Generation([ticket], 1, generator.metrics)
            generator.metrics.note_prompt(generation.usage.prompt)
            try:
                (result,) = await unless_gone(request, generation.whole())
            finally:
                generation.close()
        finally:
            ticket.close()
        plain = asked.encoding_format != "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _numbers(vector) if plain else vector,
            }
            for index, vector in enumerate(result.text.split("\n"))
        ]
        tokens = generation.usage.prompt
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        body: dict[str, Any] = {"object": "list", "data": data, "model": settings.name}
        return JSONResponse({**body, "usage": usage})


def _numbers(vector: str) -> list[float]:
    raw = base64.b64decode(vector)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))
