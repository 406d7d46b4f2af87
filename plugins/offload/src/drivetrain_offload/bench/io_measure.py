"""How fast a file system reads and writes under given settings; ``drivetrain bench io``."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from drivetrain_offload.file_io import (
    AsyncFile,
    FileIOError,
    IOSettings,
    Request,
    aligned_empty,
)

Direction = Literal["read", "write"]

LARGE_REQUEST = 16 << 20
"""Bytes that homes of states move at once, about."""

_NEARLY = 0.97
"""Settings this close to the best are as good: a repetition would order them differently."""


@dataclass(frozen=True)
class Measurement:
    """What one direction did.

    Args:
        bytes_per_second: throughput.
        mean_latency: seconds from handing a block to the system to its completion.
        p99_latency: seconds that 99 % of the blocks do not exceed.
        cores: processor seconds of this process per second.
    """

    bytes_per_second: float
    mean_latency: float
    p99_latency: float
    cores: float


@dataclass(frozen=True)
class Row:
    """Both directions under one setting.

    Args:
        settings: what was asked for.
        engine: what served it.
        read: from the file.
        write: to the file.
    """

    settings: IOSettings
    engine: str
    read: Measurement
    write: Measurement

    @property
    def bytes_per_second(self) -> float:
        """Of bytes that are read and written back, as optimizer states are."""
        return 1 / (1 / self.read.bytes_per_second + 1 / self.write.bytes_per_second)

    @property
    def window(self) -> int:
        """Bytes under way."""
        settings = self.settings
        return settings.block_size * settings.queue_depth * settings.intra_op_parallelism

    def config(self) -> dict[str, Any]:
        """The ``aio`` section that asks for this setting."""
        return {"aio": asdict(self.settings)}


@contextmanager
def scratch_file(folder: Path, nbytes: int) -> Iterator[str]:
    """The path of a file in ``folder`` that is gone afterwards, even if this process is killed.

    Raises:
        FileIOError: it cannot be made there.
    """
    path = folder / f".drivetrain-io-bench-{os.getpid()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise FileIOError("cannot make", path, error.errno or errno.EIO) from error
    try:
        # Its name in /proc leads to a file that has no other name any more.
        reopened = f"/proc/self/fd/{descriptor}"
        if Path(reopened).exists():
            path.unlink()
        else:
            reopened = str(path)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            detail = f", {nbytes} bytes"
            code = error.errno or errno.EIO
            raise FileIOError("cannot reserve space for", path, code, detail) from error
        yield reopened
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(path: str, nbytes: int, grid: Sequence[IOSettings], seconds: float) -> Iterator[Row]:
    """Measure a file of ``nbytes`` under each setting, ``seconds`` per direction."""
    # Space that was never written is not read from the disk.
    move(path, IOSettings(), "write", nbytes, seconds=float("inf"), passes=1)
    for settings in grid:
        found = {
            direction: move(path, settings, direction, nbytes, seconds=seconds)
            for direction in ("write", "read")
        }
        yield Row(settings, found["read"][1], found["read"][0], found["write"][0])


def move(
    path: str,
    settings: IOSettings,
    direction: str,
    nbytes: int,
    *,
    seconds: float,
    request: int = LARGE_REQUEST,
    passes: int | None = None,
) -> tuple[Measurement, str]:
    """Read or write a file from end to end, again and again.

    Args:
        path: a file of ``nbytes`` bytes.
        settings: how.
        direction: ``"read"`` or ``"write"``.
        nbytes: a multiple of ``request``.
        seconds: no request begins later.
        request: bytes of one request.
        passes: how often at most; ``None`` for as long as there is time.

    Returns:
        What was measured, and the name of the engine.
    """
    window = settings.block_size * settings.queue_depth * settings.intra_op_parallelism
    # While one request waits to be taken note of, the others keep the queues full.
    count = 2 + 2 * window // request
    memory = aligned_empty(count * request, torch.uint8).fill_(1).view(count, -1).unbind()
    starts = range(0, nbytes - request + 1, request)
    last = None if passes is None else passes * len(starts)
    under_way: deque[Request] = deque()
    with AsyncFile(path, mode="r+", **asdict(settings)) as file:
        begin = file.read if direction == "read" else file.write
        before, moved = file.engine.latencies(), 0
        cpu, began = time.process_time(), time.perf_counter()
        for number, start in enumerate(itertools.cycle(starts)):
            if number == last or time.perf_counter() - began > seconds:
                break
            if len(under_way) == len(memory):
                under_way.popleft().wait()
            under_way.append(begin(memory[number % len(memory)], start))
            moved += request
        file.wait()
        spent, cpu = time.perf_counter() - began, time.process_time() - cpu
        latencies, name = file.engine.latencies().since(before), file.engine.name
    measured = Measurement(moved / spent, latencies.mean, latencies.quantile(0.99), cpu / spent)
    return measured, name


def best(rows: Sequence[Row]) -> Row:
    """Of the settings that are nearly the fastest the one with the fewest bytes under way."""
    enough = _NEARLY * max(row.bytes_per_second for row in rows)
    fast = [row for row in rows if row.bytes_per_second >= enough]
    return min(fast, key=lambda row: (row.window, -row.bytes_per_second))
