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
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from drivetrain.contracts import Progress, Serves
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain_server.workers.edits import Both, Edit, Grammars, Guide, Penalties
from drivetrain_server.workers.group import RANKS_SECONDS, Group, Silent
from drivetrain_server.workers.loading import adapters_of, described, load, load_adapters
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


@dataclass(frozen=True)
class _Order:
    """What the thread that computes is to do, and the message that says so to other ranks."""

    message: Message
    act: Callable[[], None]


class Worker:
    """Carries requests from the wire to the engine, and progress back.

    Args:
        wire: to the server.
        engine: used by the main thread alone.
        group: the other ranks that compute the model, if there are any.
    """

    def __init__(self, wire: Wire | Silent, engine: Serves, group: Group | None = None) -> None:
        self._wire, self._engine, self._group = wire, engine, group
        self._shared = group is not None
        self._deadlines: dict[int, float] = {}
        # A fast tokenizer may not be used by two threads at once.
        self._tokenizer = copy.deepcopy(engine.tokenizer)
        self._grammars: Grammars | None = None
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
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

    def let_ranks_speak(self) -> None:
        """Let the server hear of another rank's end first, which explains an error here."""
        if self._group is not None:
            self._group.wait(RANKS_SECONDS)

    # -- the thread that reads ------------------------------------------------------------------

    def _read(self) -> None:
        assert isinstance(self._wire, Wire)
        while (message := self._wire.receive()) is not None:
            kind = message["do"]
            if kind == "ping":
                self._wire.send(self._pong())
            elif kind == "add":
                self._prepare(message)
            elif kind == "adapter":
                self._orders.put(_Order(message, partial(self._adapt, message)))
            elif kind == "embed":
                self._refuse(
                    message["id"], Refused(_NO_VECTORS, status=501, code="not_implemented")
                )
            elif kind == "cancel":
                self._orders.put(_Order(message, partial(self._cancel, message["id"])))
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
            self._orders.put(_Order(message, act))

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
        return lambda: self._add(
            opened, tokens, self._engine.sampling(**sampling), message.get("timeout")
        )

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
        done, going_on = self._overdue(), True
        while going_on and (not self._engine.busy or not self._orders.empty()):
            order = self._orders.get()
            if order is None:
                going_on = False
            else:
                order.act()
                done.append(order.message)
        if self._group is not None:
            self._group.tell(done, close=not going_on)
        return going_on

    def _overdue(self) -> list[Message]:
        """End what has taken too long, where the engine knows no clock; what others are told."""
        now = time.monotonic()
        late = [key for key, deadline in self._deadlines.items() if now >= deadline]
        for key in late:
            self._cancel(key, late=True)
        return [{"do": "cancel", "id": key} for key in late]

    def _add(self, opened: _Open, tokens: list[int], params: Any, timeout: float | None) -> None:
        if self._shared:  # ranks have no common clock, so the first one ends what is late
            if self._group is not None and timeout is not None:
                self._deadlines[opened.id] = time.monotonic() + timeout
            timeout = None
        try:
            number = self._engine.add(tokens, params, timeout=timeout)
        except DrivetrainError as error:
            self._refuse(opened.id, error)
            return
        self._open[number], self._numbers[opened.id] = opened, number
        self._wire.send({"is": "begun", "id": opened.id, "prompt_tokens": len(tokens)})

    def _adapt(self, message: Message) -> None:
        """Load an adapter, or forget it."""
        name, path = message["name"], message["path"]
        try:
            adapters = adapters_of(self._engine)
            if path:
                adapters.load(name, path)
            else:
                adapters.unload(name)
        except DrivetrainError as error:
            self._refuse(message["id"], error)
        else:
            self._wire.send({"is": "begun", "id": message["id"], "prompt_tokens": 0})

    def _cancel(self, id: int, *, late: bool = False) -> None:
        self._deadlines.pop(id, None)
        number = self._numbers.get(id)
        if number is None:
            return
        ended = self._engine.cancel(number)
        if late:
            self._show([_as_late(each) for each in ended])
        self._numbers.pop(id, None)
        self._open.pop(number, None)

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
                    self._deadlines.pop(opened.id, None)
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


@dataclass(frozen=True)
class _Round:
    """What the first rank has done before a step, prepared."""

    acts: Sequence[Callable[[], None]]
    close: bool


def _raise(error: Exception) -> None:
    raise error


class Follower(Worker):
    """A rank beside the first: does what that one has done, and says nothing to the server.

    As there, one thread reads and prepares (tokens, grammars), and the main thread computes.

    Args:
        orders: to the first rank.
        engine: used by the main thread alone.
    """

    def __init__(self, orders: Wire, engine: Serves) -> None:
        super().__init__(Silent(), engine)
        self._shared = True
        self._rounds: SimpleQueue[_Round] = SimpleQueue()
        self._leader = orders

    def run(self) -> None:
        """Follow until told to close."""
        threading.Thread(target=self._listen, name="intake", daemon=True).start()
        while not (told := self._rounds.get()).close:
            for act in told.acts:
                act()
            self._show(self._engine.step())
        self._engine.close()

    def _act(self, message: Message) -> Callable[[], None]:
        if message["do"] == "add":
            try:
                return self._prepared(message)
            except Exception as error:  # the first rank could, so the thread that computes fails
                logger.exception("a request could not be prepared")
                return partial(_raise, error)
        if message["do"] == "adapter":
            return partial(self._adapt, message)
        return partial(self._cancel, message["id"])

    def _listen(self) -> None:
        while (told := self._leader.receive()) is not None:
            acts = [self._act(message) for message in told["orders"]]
            self._rounds.put(_Round(acts, told["close"]))
            if told["close"]:
                return
        os._exit(1)  # the first rank has gone


def _as_late(progress: Progress) -> Progress:
    done = progress.completion
    return replace(progress, completion=done and replace(done, finish_reason="deadline"))


def _worker(wire: Wire, order: Message) -> Worker | VectorWorker:
    """What ``order`` asks for, loaded; other ranks are started first, as all load together.

    Raises:
        DrivetrainError: the model cannot be served.
    """
    group = None
    if order["ranks"] > 1 and not order.get("follow"):

        def lost(message: Message) -> None:
            wire.send(message)
            os._exit(1)  # a step that waits for that rank would never end

        group = Group(order, order["ranks"], lost)
    try:
        engine: Any = load(order)
        failed = load_adapters(engine, order)
    except Exception as error:
        if group is not None:
            group.wait(RANKS_SECONDS)  # another rank's end explains an error here
        if isinstance(error, OSError):  # of a file, and not of the connection
            raise DrivetrainError(f"{type(error).__name__}: {error}") from error
        raise
    embeds = hasattr(engine, "embed")
    if embeds and order["ranks"] > 1:
        raise ConfigError("a model that makes vectors is computed by one rank; leave --ranks out")
    if order.get("follow"):
        return Follower(wire, engine)
    wire.send({"is": "ready", "failed": failed, **described(engine)})
    return VectorWorker(wire, engine) if embeds else Worker(wire, engine, group)


def main(descriptor: int) -> int:
    """Load what the first message names and serve it; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when workers end
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    wire = Wire(socket.socket(fileno=descriptor))
    order = wire.receive()
    if order is None:
        return 1
    worker: Worker | VectorWorker | None = None
    try:
        worker = _worker(wire, order)
        worker.run()
    except DrivetrainError as error:
        if isinstance(worker, Worker):
            worker.let_ranks_speak()
        wire.send({"is": "failed", "message": str(error), "final": isinstance(error, ConfigError)})
        return 2
    except OSError:
        logger.exception("the connection to the server broke")
        return 1
    except Exception as error:
        logger.exception("the engine has failed")
        if isinstance(worker, Worker):
            worker.let_ranks_speak()
        wire.send({"is": "failed", "message": f"{type(error).__name__}: {error}", "final": False})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
