"""The worker of an engine that makes vectors of texts."""

from __future__ import annotations

import base64
import logging
import os
import threading
from queue import SimpleQueue
from typing import Any

import torch

from drivetrain.contracts import Embeds
from drivetrain.errors import DrivetrainError
from drivetrain_server.workers.wire import Message, Wire

logger = logging.getLogger("drivetrain.server.worker")

_NO_TEXT = "this model makes vectors of texts (/v1/embeddings) and generates none"


class VectorWorker:
    """Carries texts from the wire to the engine, and vectors back.

    One thread reads; the main thread takes all requests that have come and has the engine compute
    them together, so that texts of several clients share batches.

    Args:
        wire: to the server.
        engine: used by the main thread alone.
    """

    def __init__(self, wire: Wire, engine: Embeds) -> None:
        self._wire, self._engine = wire, engine
        self._orders: SimpleQueue[Message | None] = SimpleQueue()

    def run(self) -> None:
        """Serve until told to close."""
        threading.Thread(target=self._read, name="intake", daemon=True).start()
        while (order := self._orders.get()) is not None:
            orders = [order]
            while not self._orders.empty():
                following = self._orders.get()
                if following is None:
                    self._orders.put(None)
                    break
                orders.append(following)
            self._compute(orders)
        self._engine.close()

    def _read(self) -> None:
        while (message := self._wire.receive()) is not None:
            kind = message["do"]
            if kind == "ping":
                waiting = float(self._orders.qsize())
                self._wire.send({"is": "pong", "step_seconds": 0.0, "waiting": waiting})
            elif kind == "embed":
                self._orders.put(message)
            elif kind in ("add", "adapter"):
                self._refuse(message["id"], _NO_TEXT, status=501, code="not_implemented")
            elif kind == "close":
                self._orders.put(None)
                return
        os._exit(1)  # nobody is left to compute for

    def _compute(self, orders: list[Message]) -> None:
        taken: list[tuple[int, list[list[int]]]] = []
        for order in orders:
            try:
                taken.append(
                    (order["id"], [self._engine.tokens(each) for each in order["prompts"]])
                )
            except DrivetrainError as error:
                self._refuse(order["id"], str(error))
        rows = [row for _, prompts in taken for row in prompts]
        if not rows:
            return
        try:
            vectors = self._engine.embed(rows)
        except Exception as error:
            logger.exception("texts could not be computed")
            for key, _ in taken:
                self._refuse(key, f"{type(error).__name__}: {error}", status=500)
            return
        start = 0
        for key, prompts in taken:
            own = vectors[start : start + len(prompts)]
            start += len(prompts)
            self._wire.send(
                {
                    "is": "embedded",
                    "id": key,
                    "prompt_tokens": sum(map(len, prompts)),
                    "vectors": "\n".join(as_text(vector) for vector in own),
                }
            )

    def _refuse(self, id: int, why: str, *, status: int = 400, code: str | None = None) -> None:
        self._wire.send({"is": "refused", "id": id, "status": status, "code": code, "message": why})


def as_text(vector: torch.Tensor) -> str:
    """A vector as base64 of little-endian fp32, as the protocol has it."""
    numbers: Any = vector.to(torch.float32).contiguous().numpy()
    return base64.b64encode(numbers.astype("<f4", copy=False).tobytes()).decode()
