"""Writes the ledger of one rank into its file, a line for every step.

A line is handed to the system as a whole, so a process that is killed loses no step but the one
under way; what a machine loses that goes down is up to its file system.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts import Communicator, CommunicatorWrapper, Handle, Purpose, Tag
from drivetrain.contracts.world.collective import Collective, axis_name
from drivetrain.contracts.world.communicator import DONE
from drivetrain.errors import DrivetrainError
from drivetrain_profiler.ledger.section import PATH, LedgerSection
from drivetrain_profiler.ledger.timeline import (
    DeviceClock,
    HostClock,
    RecordedLedger,
    Timeline,
    Window,
    exchange,
)

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

FORMAT = 1
_MEETING = Tag(Purpose.CONTROL, site="start of a ledger")


class Recorder:
    """The ledger of one rank of a job.

    Args:
        job: has just been connected; its own ledger is put into a timeline.
        section: the settings.

    Raises:
        DrivetrainError: the file cannot be made.
    """

    def __init__(self, job: Job, section: LedgerSection) -> None:
        cpu = job.device.type == "cpu"
        self.timeline = Timeline(HostClock() if cpu else DeviceClock(job.device))
        job.ledger = RecordedLedger(self.timeline)
        self._job, self._every = job, section.timeline_every
        self._began = self._clock = time.time()
        self._at = 0.0
        self._pending: deque[tuple[Window, dict[str, Any]]] = deque()
        self._sent: dict[str, float] = {}
        self._steps = 0
        self._file = _opened(Path(section.path), job.rank)
        self._write(
            {
                "format": FORMAT,
                "rank": job.rank,
                "world": job.world_size,
                "axes": {axis: job.mesh.size(axis) for axis in ("pp", "dp", "sp", "tp")},
                "started": self._began - _age(),
                "opened": self._began,
            }
        )

    def meet(self, communicator: Communicator) -> None:
        """Agree on a name for this attempt, and on the time. Collective over all ranks.

        The ranks leave a collective at about the same moment, by which hosts whose clocks differ
        are told apart from ranks that are late.
        """
        world = communicator.size("world")
        stamps = torch.zeros(world, dtype=torch.int64, device=self._job.device)
        own = torch.tensor([int(self._began * 1e6)], device=self._job.device)
        for _ in range(2):  # the first one also connects
            communicator.all_gather(stamps, own, "world", _MEETING)
        first = int(stamps[0])
        self._write({"attempt": first, "met": time.time()})

    def step(self, engine: Engine) -> None:
        """A boundary has passed."""
        job = self._job
        line: dict[str, Any] = {
            "step": engine.global_steps + 1,
            "engine": job.engines.index(engine) if engine in job.engines else len(job.engines),
            "samples": engine.train_batch_size(),
            "memory": self._memory(),
            "sent": self._bytes(),
        }
        self._keep(line)
        self._steps += 1

    def close(self) -> None:
        """Write what is left. The file is closed with it."""
        if self._file < 0:
            return
        self._keep({"end": time.time(), "memory": self._memory(), "sent": self._bytes()})
        self._settle(wait=True)
        os.close(self._file)
        self._file = -1

    def _keep(self, line: dict[str, Any]) -> None:
        now = time.time()
        line["host"], self._clock = now - self._clock, now
        if self._every and self._steps % self._every < 2:
            line["spans"] = []
        self._pending.append((self.timeline.cut(), line))
        self._settle(wait=False)

    def _settle(self, *, wait: bool) -> None:
        """Write the windows that the device has passed."""
        clock = self.timeline.clock
        while self._pending:
            window, line = self._pending[0]
            if not wait and not clock.reached(window.end):
                return
            clock.wait(window.end)
            self._pending.popleft()
            seconds: dict[str, float] = {}
            begin = self._at
            for part in window.intervals(clock, begin):
                seconds[part.column] = seconds.get(part.column, 0.0) + part.seconds
                self._at = part.begin + part.seconds
                if "spans" in line and part.seconds >= 1e-6:
                    times = round(part.begin, 7), round(part.seconds, 7)
                    line["spans"].append([part.column, part.name, *times])
            line["begin"], line["wall"] = round(begin, 7), round(self._at - begin, 7)
            line["seconds"] = {column: round(spent, 7) for column, spent in seconds.items()}
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def _memory(self) -> list[int]:
        """Bytes of the process, bytes of tensors on the device, and the most there were."""
        accelerator = self._job.accelerator
        if self._job.device.type == "cpu":
            return [_resident(), 0, 0]
        return [_resident(), accelerator.memory_allocated(), accelerator.max_memory_allocated()]

    def _bytes(self) -> dict[str, float]:
        """What this rank has sent since the last call, by axis and purpose."""
        totals: dict[str, float] = {}
        for call, traffic in self._job.byte_log.items():
            name = f"{axis_name(call.axis)} {call.purpose.value}"
            totals[name] = totals.get(name, 0.0) + traffic.sent_bytes
        before, self._sent = self._sent, totals
        changed = {name: total - before.get(name, 0.0) for name, total in totals.items()}
        return {name: round(sent) for name, sent in changed.items() if sent > 0}


class LedgerCommunicator(CommunicatorWrapper):
    """Tells a timeline what a rank waits for.

    Args:
        inner: the communicator below.
        timeline: of this rank.
    """

    def __init__(self, inner: Communicator, timeline: Timeline) -> None:
        super().__init__(inner)
        self._timeline = timeline

    def run(self, collective: Collective) -> Handle:
        timeline = self._timeline
        if not timeline.is_here:
            return self.inner.run(collective)
        tag = collective.tag
        column = exchange(axis_name(collective.axis), tag.purpose.value)
        name = f"{collective.kind} {tag.site or tag.key}".rstrip()
        timeline.enter(column, name)
        try:
            handle = self.inner.run(collective)
        finally:
            timeline.leave()
        return handle if handle is DONE else _Awaited(handle, timeline, column, name)


class _Awaited:
    """A handle whose wait counts as communication."""

    __slots__ = ("_column", "_handle", "_name", "_timeline")

    def __init__(self, handle: Handle, timeline: Timeline, column: str, name: str) -> None:
        self._handle, self._timeline, self._column, self._name = handle, timeline, column, name

    def wait(self) -> None:
        if not self._timeline.is_here:
            self._handle.wait()
            return
        self._timeline.enter(self._column, self._name)
        try:
            self._handle.wait()
        finally:
            self._timeline.leave()


def _opened(folder: Path, rank: int) -> int:
    """A new file for one rank and attempt."""
    name = f"{time.time_ns() // 1_000_000}-rank{rank:05d}-{os.getpid()}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        return os.open(folder / name, flags, 0o644)
    except OSError as error:
        raise DrivetrainError(
            f"{PATH}.path: {folder / name} cannot be written: {error.strerror}"
        ) from error


def _age() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - begun / os.sysconf("SC_CLK_TCK"))


def _resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
