"""The engine for machines without a C++ compiler: Python's threads and positioned calls."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from drivetrain_offload.file_io.engine import (
    LATENCY_BUCKETS,
    Engine,
    Latencies,
    Outcome,
    Transfer,
    bucket_start,
)
from drivetrain_offload.file_io.errors import END_OF_FILE
from drivetrain_offload.file_io.memory import aligned
from drivetrain_offload.file_io.pages import ALIGNMENT
from drivetrain_offload.file_io.settings import IOSettings

_MOST_THREADS = 32
_LONGEST_BLOCK = 1 << 30
"""One call of the system moves less than 2 GiB."""


@dataclass
class _File:
    direct: int
    buffered: int
    refused: bool = False


class PythonEngine(Engine):
    """Like the native one over blocking calls; a thread for each block under way.

    Args:
        settings: ``single_submit`` and ``overlap_events`` mean nothing here.
    """

    name = "python"

    def __init__(self, settings: IOSettings) -> None:
        self._block = min(aligned(settings.block_size), _LONGEST_BLOCK)
        threads = min(_MOST_THREADS, settings.queue_depth * settings.intra_op_parallelism)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="drivetrain-file-io")
        self._lock = threading.Lock()
        self._total = 0.0
        self._counts = [0] * LATENCY_BUCKETS

    def open(self, direct: int, buffered: int) -> _File:
        return _File(direct, buffered)

    def forget(self, file: _File) -> None:
        pass

    def submit(self, transfer: Transfer) -> tuple[Transfer, list[Future[Outcome]]]:
        fault, parts = transfer.fault, []
        for at, nbytes, direct in self._pieces(transfer):
            parts.append(self._pool.submit(self._move, transfer, at, nbytes, direct, fault))
            fault = 0
        return transfer, parts

    def done(self, ticket: tuple[Transfer, list[Future[Outcome]]]) -> bool:
        return all(part.done() for part in ticket[1])

    def wait(self, ticket: tuple[Transfer, list[Future[Outcome]]], seconds: float) -> bool:
        return not wait(ticket[1], timeout=seconds).not_done

    def outcome(self, ticket: tuple[Transfer, list[Future[Outcome]]]) -> Outcome:
        transfer, parts = ticket
        failed = [part.result() for part in parts if part.result().error]
        return failed[0] if failed else Outcome(0, transfer.file.refused, 0, 0)

    def latencies(self) -> Latencies:
        with self._lock:
            return Latencies(sum(self._counts), self._total, tuple(self._counts))

    def close(self) -> None:
        self._pool.shutdown()

    def _pieces(self, transfer: Transfer) -> Iterator[tuple[int, int, bool]]:
        """(first byte within the transfer, bytes, whether past the page cache)."""
        file, at = transfer.file, 0
        can = file.direct >= 0 and not file.refused and transfer.address % ALIGNMENT == 0
        while at < transfer.nbytes:
            left = transfer.nbytes - at
            direct = can and (transfer.offset + at) % ALIGNMENT == 0 and left >= ALIGNMENT
            nbytes = min(self._block, left // ALIGNMENT * ALIGNMENT if direct else left)
            yield at, nbytes, direct
            at += nbytes

    def _move(self, transfer: Transfer, at: int, nbytes: int, direct: bool, fault: int) -> Outcome:
        began = time.perf_counter()
        stop = at + nbytes
        while at < stop:
            struck, fault = fault, 0
            try:
                moved = _call(transfer, at, stop - at, direct, struck)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    direct, transfer.file.refused = False, True
                    continue
                return self._failed(transfer, error.errno or errno.EIO, at, stop)
            if moved == 0:
                return self._failed(
                    transfer, errno.EIO if transfer.writes else END_OF_FILE, at, stop
                )
            if direct and at + moved < stop:
                moved = moved // ALIGNMENT * ALIGNMENT
                direct = moved > 0
            at += moved
        self._record(time.perf_counter() - began)
        return Outcome(0, transfer.file.refused, 0, 0)

    @staticmethod
    def _failed(transfer: Transfer, code: int, at: int, stop: int) -> Outcome:
        return Outcome(code, transfer.file.refused, transfer.offset + at, stop - at)

    def _record(self, seconds: float) -> None:
        bucket = 0
        while bucket < LATENCY_BUCKETS - 1 and bucket_start(bucket + 1) <= seconds:
            bucket += 1
        with self._lock:
            self._total += seconds
            self._counts[bucket] += 1


def _call(transfer: Transfer, at: int, nbytes: int, direct: bool, fault: int) -> int:
    """One call of the system, or what a test makes of it; answers how many bytes it moved."""
    if fault > 0:
        raise OSError(fault, os.strerror(fault))
    if fault < 0:
        nbytes = nbytes // 1024 * 512 if direct else (nbytes + 1) // 2
    memory: Any = (ctypes.c_char * nbytes).from_address(transfer.address + at)
    descriptor = transfer.file.direct if direct else transfer.file.buffered
    move = os.pwritev if transfer.writes else os.preadv
    return move(descriptor, [memoryview(memory)], transfer.offset + at)
