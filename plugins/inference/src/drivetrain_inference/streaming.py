"""The engine for programs with an event loop: requests of many tasks, one thread that computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from drivetrain.errors import DrivetrainError
from drivetrain_inference.engine import InferenceEngine, Prompt
from drivetrain_inference.requests import Completion, Progress, SamplingParams

_Order = Callable[[], None]


class EngineStoppedError(DrivetrainError, RuntimeError):
    """The thread that computes has ended, by ``close`` or by an error that it names."""


class AsyncEngine:
    """Runs an :class:`InferenceEngine` in a thread of its own; all methods are for event loops.

    Args:
        engine: used by that thread alone from now on.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._streams: dict[int, Callable[[Progress | BaseException], None]] = {}
        self._end: BaseException | None = None
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncIterator[Progress]:
        """Yield the progress of one request; leaving the loop, or cancelling the task, cancels it.

        Raises:
            ConfigError: the prompt cannot be served.
            QueueFullError: too many requests wait.
            EngineStoppedError: the engine was closed, or its thread has failed.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Progress | BaseException]()

        def show(item: Progress | BaseException) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def begin() -> int:
            self._refuse_if_ended()
            number = self.engine.add(prompt, params, timeout=timeout)
            self._streams[number] = show
            return number

        asked = self._asked(begin)
        try:
            number = await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(self._abandon)
            raise
        left = (params or SamplingParams()).n
        try:
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise EngineStoppedError(f"the engine has stopped: {item}") from item
                left -= item.completion is not None
                yield item
        finally:
            if left:
                self._cancel_later(number)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Completion]:
        """All results of one prompt."""
        found: dict[int, Completion] = {}
        async for progress in self.stream(prompt, params, timeout=timeout):
            if progress.completion is not None:
                found[progress.index] = progress.completion
        return [found[index] for index in sorted(found)]

    async def close(self) -> None:
        """End what runs, and the thread."""
        self._orders.put(None)  # after the end nobody reads it
        await asyncio.to_thread(self._thread.join)
        self.engine.close()

    # -- between the threads --------------------------------------------------------------------

    def _asked(self, act: Callable[[], int]) -> asyncio.Future[int]:
        answer: Future[int] = Future()

        def order() -> None:
            try:
                answer.set_result(act())
            except BaseException as error:  # noqa: BLE001 - the asking task gets it
                answer.set_exception(error)

        self._order(order)
        return asyncio.wrap_future(answer)

    def _order(self, order: _Order) -> None:
        with self._ending:  # so that no order comes after the last look at them
            self._refuse_if_ended()
            self._orders.put(order)

    def _refuse_if_ended(self) -> None:
        if self._end is not None:
            raise EngineStoppedError(f"the engine has stopped: {self._end}") from self._end

    def _abandon(self, asked: asyncio.Future[int]) -> None:
        """Cancel a request whose task has left before it began."""
        if not asked.cancelled() and asked.exception() is None:
            self._cancel_later(asked.result())

    def _cancel_later(self, number: int) -> None:
        with suppress(EngineStoppedError):  # all requests have ended with the engine
            self._order(lambda: self._cancel(number))

    def _cancel(self, number: int) -> None:
        self._streams.pop(number, None)
        self.engine.cancel(number)

    def _run(self) -> None:
        end: BaseException = EngineStoppedError("it was closed")
        try:
            while self._follow_orders():
                for progress in self.engine.step():
                    self._show(progress)
        except BaseException as error:  # noqa: BLE001 - every task that waits gets it
            end = error
        with self._ending:
            self._end = end
        while not self._orders.empty():
            late = self._orders.get()
            if late is not None:
                late()  # each finds out that this is the end
        for show in self._streams.values():
            show(end)
        self._streams.clear()

    def _follow_orders(self) -> bool:
        """Follow what was ordered; wait if there is nothing to compute. False ends the thread."""
        while not self.engine.busy or not self._orders.empty():
            order: Any = self._orders.get()
            if order is None:
                return False
            order()
        return True

    def _show(self, progress: Progress) -> None:
        show = self._streams.get(progress.request)
        if show is None:
            return
        if progress.completion is not None and not self._is_running(progress.request):
            del self._streams[progress.request]
        show(progress)

    def _is_running(self, request: int) -> bool:
        return request in self.engine._results
