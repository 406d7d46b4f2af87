"""One thread per rank that works on host tensors while the device goes on."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from drivetrain.errors import TrainingError
from drivetrain_offload.host.stall import stalled


@dataclass(eq=False)
class Ticket:
    """One piece of work.

    Args:
        run: the work.
        prepare: called once before, while earlier work runs, where the queue allows it.
    """

    run: Callable[[], None]
    prepare: Callable[[], None] | None = None
    _done: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None

    def wait(self) -> None:
        """Return once the work is done.

        Raises:
            BaseException: whatever it raised.
        """
        self.settle()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Return once the work is done, or has failed."""
        if not self._done.is_set():
            with stalled():
                self._done.wait()

    @property
    def done(self) -> bool:
        """Whether the work is done, or has failed."""
        return self._done.is_set()

    def carry_out(self) -> None:
        """Run; an error is raised by :meth:`wait`."""
        if self._error is None:
            self._attempt(self.run)
        self._done.set()

    def make_ready(self) -> None:
        """Prepare; an error is raised by :meth:`wait`."""
        if self.prepare is not None:
            prepare, self.prepare = self.prepare, None
            self._attempt(prepare)

    def drop(self, error: BaseException) -> None:
        """End without having run."""
        self._error = error
        self._done.set()

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised by wait() on the rank's own thread
            self._error = error


class Worker:
    """Runs tickets in their order on a thread of its own, which starts with the first one.

    Args:
        cores: number of threads that torch and the kernels use for this work.
    """

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._queue: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, run: Callable[[], None], prepare: Callable[[], None] | None = None) -> Ticket:
        """Queue work.

        Raises:
            TrainingError: the job is closed.
        """
        ticket = Ticket(run, prepare)
        with self._changed:
            if self._closed:
                raise TrainingError("offloaded states were updated after their job was closed")
            self._queue.append(ticket)
            self._changed.notify()
        if self._thread is None:
            self._start()
        return ticket

    def drain(self) -> None:
        """Return once nothing is queued and nothing runs."""
        if self._thread is not None and not self._closed:
            self.submit(lambda: None).wait()

    def close(self) -> None:
        """End the thread after the work under way; what is queued is dropped."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for ticket in dropped:
            ticket.drop(TrainingError("the job was closed before the update of offloaded states"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _start(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._loop, args=(started,), name="drivetrain-offload", daemon=True
        )
        self._thread.start()
        started.wait()
        atexit.register(self.close)  # nothing may run while the interpreter goes down
        # A thread's number becomes the default of those that start later; put that back.
        torch.set_num_threads(torch.get_num_threads())

    def _loop(self, started: threading.Event) -> None:
        torch.set_num_threads(self.cores)
        started.set()
        with torch.no_grad():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._closed)
                    if not self._queue:
                        return
                    ticket = self._queue.popleft()
                    following = self._queue[0] if self._queue else None
                ticket.make_ready()
                if following is not None:
                    following.make_ready()
                ticket.carry_out()
                del ticket, following  # what they hold is free before the next one comes
