"""The process of one engine: ``python -m drivetrain_server.workers.worker DESCRIPTOR``.

One thread reads messages and prepares requests (tokens, grammars); the main thread computes. The
process ends with the connection: a server that dies leaves no worker behind.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from drivetrain.contracts import Progress, Serves
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain_server.workers.edits import Both, Edit, Grammars, Guide, Penalties
from drivetrain_server.workers.loading import described, load
from drivetrain_server.workers.vectors import VectorWorker
from drivetrain_server.workers.wire import Message, Wire

logger = logging.getLogger("drivetrain.server.worker")

_NO_VECTORS = "this model generates text and has no embeddings"


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """A request that cannot be served; the client gets its message."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Open:
    """A request that the engine has."""

    def __init__(self, id: int, results: int) -> None:
        self.id, self.left = id, results
        self.guides: list[Guide] = []


class Worker:
    """Carries requests from the wire to the engine, and progress back.

    Args:
        wire: to the server.
        engine: used by the main thread alone.
    """

    def __init__(self, wire: Wire, engine: Serves) -> None:
        self._wire, self._engine = wire, engine
        # A fast tokenizer may not be used by two threads at once.
        self._tokenizer = copy.deepcopy(engine.tokenizer)
        self._grammars: Grammars | None = None
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._open: dict[int, _Open] = {}
        self._numbers: dict[int, int] = {}
        self._step_began = 0.0

    def run(self) -> None:
        """Serve until told to close."""
        threading.Thread(target=self._read, name="intake", daemon=True).start()
        while self._follow_orders():
            self._step_began = time.monotonic()
            progress = self._engine.step()
            self._step_began = 0.0
            self._show(progress)
        self._engine.close()

    # -- the thread that reads ------------------------------------------------------------------

    def _read(self) -> None:
        while (message := self._wire.receive()) is not None:
            kind = message["do"]
            if kind == "ping":
                self._wire.send(self._pong())
            elif kind == "add":
                self._prepare(message)
            elif kind == "embed":
                self._refuse(
                    message["id"], Refused(_NO_VECTORS, status=501, code="not_implemented")
                )
            elif kind == "cancel":
                self._orders.put(partial(self._cancel, message["id"]))
            else:
                self._orders.put(None)
                return
        os._exit(1)  # nobody is left to compute for

    def _pong(self) -> Message:
        began = self._step_began
        seconds = time.monotonic() - began if began else 0.0
        return {"is": "pong", "step_seconds": seconds, **self._engine.status()}

    def _prepare(self, message: Message) -> None:
        try:
            act = self._prepared(message)
        except (Refused, DrivetrainError) as error:
            self._refuse(message["id"], error)
        except Exception as error:
            logger.exception("a request could not be prepared")
            self._refuse(message["id"], Refused(f"{type(error).__name__}: {error}", status=500))
        else:
            self._orders.put(act)

    def _prepared(self, message: Message) -> Callable[[], None]:
        tokens = self._tokens(message)
        sampling = dict(message["sampling"])
        room = self._room(len(tokens))
        wanted = sampling.get("max_new_tokens")
        if wanted is None:
            sampling["max_new_tokens"] = min(room, message["most"])
        elif wanted > room:
            raise Refused(
                f"{len(tokens)} tokens of prompt and {wanted} new ones are more than the "
                f"{self._capacity()} that this server has room for",
                code="context_length_exceeded",
            )
        makers = self._makers(message["edits"])
        if makers and any(kind in message["edits"] for kind in ("schema", "regex")):
            end = self._tokenizer.eos_token_id
            sampling["stop_tokens"] = [*sampling.get("stop_tokens", ()), end]
        for name in ("stop", "stop_tokens"):
            if name in sampling:
                sampling[name] = tuple(sampling[name])
        opened = _Open(message["id"], sampling.get("n", 1))

        def edit() -> Edit:
            edits = [make() for make in makers]
            opened.guides += [each for each in edits if isinstance(each, Guide)]
            return edits[0] if len(edits) == 1 else Both(edits)

        if makers:
            sampling["edit"] = edit
        timeout = message.get("timeout")
        return lambda: self._add(opened, tokens, self._engine.sampling(**sampling), timeout)

    def _tokens(self, message: Message) -> list[int]:
        prompt = message["prompt"]
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise Refused("the model has no tokenizer, so prompts must be tokens")
            special = message["special"]
            prompt = self._tokenizer(prompt, add_special_tokens=special)["input_ids"]
        if not prompt:
            raise Refused("the prompt is empty")
        if self._room(len(prompt)) < 1:
            raise Refused(
                f"the prompt has {len(prompt)} tokens, and this server has room for "
                f"{self._capacity()}, with at least one new token",
                code="context_length_exceeded",
            )
        return list(prompt)

    def _capacity(self) -> int:
        return min(self._engine.context, int(self._engine.status()["cache_tokens"]))

    def _room(self, prompt: int) -> int:
        return self._capacity() - prompt

    def _makers(self, edits: Message) -> list[Callable[[], Edit]]:
        makers: list[Callable[[], Edit]] = []
        presence, frequency = edits.get("presence", 0.0), edits.get("frequency", 0.0)
        bias = {int(token): value for token, value in edits.get("bias", {}).items()}
        size = len(self._tokenizer) if bias and self._tokenizer is not None else 0
        if any(not 0 <= token < size for token in bias):
            raise Refused("logit_bias names a token that the model has not")
        if presence or frequency or bias:
            makers.append(lambda: Penalties(presence, frequency, bias))
        for kind in ("schema", "regex"):
            if kind in edits:
                if self._tokenizer is None:
                    raise Refused("structured output needs a tokenizer")
                self._grammars = self._grammars or Grammars(self._tokenizer)
                makers.append(self._grammars.maker(kind, edits[kind]))
        return makers

    def _refuse(self, id: int, error: Exception) -> None:
        status, code = getattr(error, "status", 400), getattr(error, "code", None)
        if "QueueFull" in type(error).__name__:
            status, code = 429, "queue_full"
        self._wire.send(
            {"is": "refused", "id": id, "status": status, "code": code, "message": str(error)}
        )

    # -- the thread that computes ---------------------------------------------------------------

    def _follow_orders(self) -> bool:
        while not self._engine.busy or not self._orders.empty():
            order = self._orders.get()
            if order is None:
                return False
            order()
        return True

    def _add(self, opened: _Open, tokens: list[int], params: Any, timeout: float | None) -> None:
        try:
            number = self._engine.add(tokens, params, timeout=timeout)
        except DrivetrainError as error:
            self._refuse(opened.id, error)
            return
        self._open[number], self._numbers[opened.id] = opened, number
        self._wire.send({"is": "begun", "id": opened.id, "prompt_tokens": len(tokens)})

    def _cancel(self, id: int) -> None:
        number = self._numbers.pop(id, None)
        if number is None:
            return
        self._open.pop(number, None)
        self._engine.cancel(number)

    def _show(self, progress: Sequence[Progress]) -> None:
        items, failed = [], dict[int, str]()
        for each in progress:
            opened = self._open.get(each.request)
            if opened is None:
                continue
            items.append(self._item(opened.id, each))
            if each.completion is not None:
                opened.left -= 1
                if not opened.left:
                    del self._open[each.request], self._numbers[opened.id]
            for guide in opened.guides:
                if guide.failed:
                    failed[opened.id] = guide.failed
        if items:
            self._wire.send({"is": "progress", "items": items})
        for key, reason in failed.items():
            self._cancel(key)
            self._refuse(key, Refused(f"the grammar cannot go on: {reason}"))

    def _item(self, id: int, progress: Progress) -> list[Any]:
        """[request, result, text, tokens, why it ended, cached tokens, log-probabilities]."""
        done, places = progress.completion, None
        if progress.logprobs is not None and progress.token is not None:
            top = [[self._text(token), value] for token, value in progress.logprobs.top]
            places = [self._text(progress.token), progress.logprobs.chosen, top]
        return [
            id,
            progress.index,
            progress.text,
            int(progress.token is not None),
            done and done.finish_reason,
            done.cached_tokens if done else 0,
            places,
        ]

    def _text(self, token: int) -> str:
        tokenizer = self._engine.tokenizer
        return str(token) if tokenizer is None else tokenizer.decode([token])


def main(descriptor: int) -> int:
    """Load what the first message names and serve it; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when workers end
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    wire = Wire(socket.socket(fileno=descriptor))
    order = wire.receive()
    if order is None:
        return 1
    try:
        engine: Any = load(order)
        embeds = hasattr(engine, "embed")
        worker = VectorWorker(wire, engine) if embeds else Worker(wire, engine)
        wire.send({"is": "ready", **described(engine)})
        worker.run()
    except DrivetrainError as error:
        wire.send({"is": "failed", "message": str(error), "final": isinstance(error, ConfigError)})
        return 2
    except OSError:
        logger.exception("the connection to the server broke")
        return 1
    except Exception as error:
        logger.exception("the engine has failed")
        wire.send({"is": "failed", "message": f"{type(error).__name__}: {error}", "final": False})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
