"""Run a function on several ranks of this host, fast, and with every error brought back."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from drivetrain.errors import DrivetrainError
from drivetrain.testing.rank import Call, Outcome
from drivetrain.testing.rank_server import KILL, STACK_SIGNAL

_GRACE_SECONDS = 30.0
"""How long ranks may go on after one has failed; those that wait for it end by themselves."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class RankError:
    """Why one rank did not return.

    Args:
        rank: which.
        error: type and message of its exception, or how its process ended.
        stack: where it was.
        at: when, on the host's monotonic clock.
        where: what it was running when it was ended, from the inside out.
    """

    rank: int
    error: str
    stack: str
    at: float
    where: str = ""


class RanksFailedError(DrivetrainError):
    """One or more ranks raised, died, or did not end in time.

    Attributes:
        errors: rank -> what happened, in order of time; the first is the cause of most others.
    """

    def __init__(self, errors: Sequence[RankError], world_size: int) -> None:
        ordered = sorted(errors, key=lambda error: error.at)
        self.errors = {error.rank: error for error in ordered}
        first = ordered[0]
        # Reports of a suite often show one line of an error, so it says where ranks that hang are.
        running = "".join(f"; rank {e.rank} was in {e.where}" for e in ordered if e.where)
        parts = [f"rank {first.rank} of {world_size} failed first: {first.error}{running}"]
        parts += [f"--- rank {e.rank}: {e.error}\n{e.stack.rstrip()}" for e in ordered]
        super().__init__("\n".join(parts))


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call ``function(*arguments)`` on every rank of a world, each a process with one thread.

    Ranks find torchrun's environment variables, so that ``init_process_group`` and ``Job.open``
    work as under torchrun. Processes are forked from one that has torch loaded and are used again
    after a call that succeeded everywhere, with environment, process group, default dtype and the
    like put back; what else a function changes in its process stays changed.

    Args:
        function: defined at the level of a module.
        world_size: number of ranks.
        arguments: plain data, tensors, whatever can be pickled; equal for all ranks.
        timeout: seconds after which all ranks are killed.
        env: further environment variables.

    Returns:
        What the function returned, by rank.

    Raises:
        RanksFailedError: with the errors and stacks of all ranks, the first failure first. Within
            thirty seconds of it all ranks have ended. On a time-out, the stacks of their threads.
        ValueError: ``function`` is not at the level of a module.
    """
    __tracebackhide__ = True  # pytest then shows the ranks' errors, not this code
    if "<locals>" in function.__qualname__ or "<lambda>" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} must be defined at the level of a module")
    pool = _pool()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    ranks = pool.take(world_size)
    finished = False
    try:
        for number, rank in enumerate(ranks):
            call = _call(function, arguments, number, world_size, store.port, env)
            rank.connection.send_bytes(pickle.dumps(call))
        results = _collect(pool, ranks, time.monotonic() + timeout, timeout)
        finished = True
    finally:
        if finished:
            pool.give_back(ranks)
        else:
            for rank in ranks:
                pool.end(rank)
    return results


def _call(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    rank: int,
    world_size: int,
    port: int,
    env: Mapping[str, str] | None,
) -> Call:
    environment = {
        **os.environ,
        **_ONE_THREAD,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, in the calling process
        # Nobody ends while others still connect to it; fake process groups of one rank cannot meet.
        "TORCH_DIST_INIT_BARRIER": "1" if world_size > 1 else "0",
        **(env or {}),
    }
    return Call(
        module=function.__module__,
        file=function.__code__.co_filename,
        name=function.__qualname__,
        arguments=pickle.dumps(arguments),
        path=list(sys.path),
        environment=environment,
    )


def _collect(pool: _Pool, ranks: Sequence[_Rank], deadline: float, timeout: float) -> list[Any]:
    """Wait for all outcomes; after a failure or the time-out, not for long."""
    __tracebackhide__ = True
    results: dict[int, Any] = {}
    errors: list[RankError] = []
    waiting = {rank.connection: number for number, rank in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            number = waiting.pop(connection)
            outcome = _outcome(pool, ranks[number])
            if outcome.result is not None:
                results[number] = pickle.loads(outcome.result)  # noqa: S301 - both ends are ours
                continue
            if not errors:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            errors.append(RankError(number, outcome.error, outcome.stack, outcome.at))
    reason = "was still running after another rank had failed"
    if not errors:
        reason = f"did not end within {timeout:g} s"
    for number in waiting.values():
        stack = pool.stacks(ranks[number])
        errors.append(RankError(number, reason, stack, time.monotonic(), _innermost(stack)))
    if errors:
        raise RanksFailedError(errors, len(ranks))
    return [results[number] for number in range(len(ranks))]


def _innermost(stack: str, calls: int = 4) -> str:
    """The innermost calls of a process's first thread, in a text of ``faulthandler``."""
    # It shows the thread that began the process last.
    frames = re.findall(r'File "(?:.*/)?(.*?)", line (\d+) in (\S+)', stack.split("\n\n")[-1])
    return " < ".join(f"{name} ({file}:{line})" for file, line, name in frames[:calls])


def _outcome(pool: _Pool, rank: _Rank) -> Outcome:
    try:
        outcome: Outcome = pickle.loads(rank.connection.recv_bytes())  # noqa: S301
    except (EOFError, ConnectionResetError):
        code = pool.end(rank, by=0)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(error=f"its process died with {how}", at=time.monotonic())
    return outcome


@dataclass
class _Rank:
    """A process of the pool.

    Args:
        pid: its id.
        connection: calls go out, outcomes come in.
        stacks: descriptor that stacks can be read from.
        ended: whether it is gone.
    """

    pid: int
    connection: Connection
    stacks: int
    ended: bool = False


class _Pool:
    """Ranks that wait for work, and the server that forks more of them.

    Several threads may use it, as tests of jobs that meet do.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.RLock()
        self._idle: list[_Rank] = []
        # torch asks for the name of every address that it is connected to, even of this host's
        # own, and the resolver waits five seconds for a name server that does not answer.
        os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
        ours, theirs = socket.socketpair()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from drivetrain.testing.rank_server import main; main()"
        )
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ONE_THREAD},
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        atexit.register(self.close)

    def take(self, number: int) -> list[_Rank]:
        """That many ranks, idle ones first."""
        with self._lock:
            while len(self._idle) < number:
                self._idle.append(self._start())
            taken, self._idle = self._idle[:number], self._idle[number:]
            return taken

    def give_back(self, ranks: Sequence[_Rank]) -> None:
        """Keep ranks for the next call, which finds those with warm caches first."""
        with self._lock:
            self._idle[:0] = ranks

    def stacks(self, rank: _Rank) -> str:
        """Where the threads of a running rank are."""
        self._request(do="signal", pid=rank.pid, signal=STACK_SIGNAL)
        text = b""
        arrived = select.poll()  # select() knows no descriptors beyond 1,023
        arrived.register(rank.stacks, select.POLLIN)
        while arrived.poll(500 if text else 5000):  # on a busy host the first words take long
            piece = os.read(rank.stacks, 65536)
            if not piece:
                break
            text += piece
        return text.decode(errors="replace") or "no stack: the process does not answer"

    def end(self, rank: _Rank, by: int = KILL) -> int:
        """End a rank by a signal, or wait for one that is ending; answers its exit code."""
        if rank.ended:
            return 0
        rank.ended = True
        rank.connection.close()
        os.close(rank.stacks)
        return self._request(do="end", pid=rank.pid, signal=by)

    def close(self) -> None:
        """End the server and with it all ranks."""
        if self.owner == os.getpid():
            self._socket.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(10)

    def _start(self) -> _Rank:
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe()
        try:
            pid = self._request([theirs.fileno(), writer], do="start")
        finally:
            theirs.close()
            os.close(writer)
        return _Rank(pid, Connection(ours.detach()), reader)

    def _request(self, descriptors: Sequence[int] = (), **request: object) -> int:
        with self._lock:  # the next answer has to be that of this request
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer = self._socket.recv(4096)
        if not answer:
            raise RuntimeError("the process that starts ranks has died; its error is on stderr")
        value: int = json.loads(answer)
        return value


def start_anew() -> None:
    """Let the next call start new ranks, for what has to be loaded before anything else runs."""
    while _pools:
        _pools.pop().close()


_pools: list[_Pool] = []
_choosing = threading.Lock()


def _pool() -> _Pool:
    """The pool of this process; a fork of the process gets its own."""
    with _choosing:
        if not _pools or _pools[-1].owner != os.getpid():
            _pools.append(_Pool())
        return _pools[-1]
