"""A log of collectives by operation and size, and its summary over ranks."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from drivetrain.contracts import (
    DONE,
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
    Purpose,
    Tag,
)
from drivetrain.contracts.world.collective import axis_name
from drivetrain.errors import TrainingError
from drivetrain.job.job import Job, open_jobs

logger = logging.getLogger("drivetrain.comms")

_EXCHANGE = Tag(Purpose.CONTROL, site="comparison of logs")

_LATEST = 1000
"""Times that are kept of collectives of one operation, size and axis."""

_WHOLE_TURNS = {Kind.ALL_REDUCE: 2, Kind.BROADCAST: 0, Kind.SEND_RECEIVE: 0, Kind.BARRIER: 0}
"""How often a payload passes a link, in (n - 1) / n of it; 0 where all of it does, once."""


@dataclass
class Record:
    """Collectives of one operation, size and axis.

    Args:
        ranks: along the axis.
        count: how many there were.
        total: seconds of all of them.
        latest: seconds of each of the latest, since a run may go on for weeks.
    """

    ranks: int
    count: int = 0
    total: float = 0.0
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))

    def add(self, seconds: float) -> None:
        """Note one."""
        self.count += 1
        self.total += seconds
        self.latest.append(seconds)

    def mean(self) -> float:
        """Mean seconds of the latest, without the tenths that are shortest and longest."""
        cut = len(self.latest) // 10
        kept = sorted(self.latest)[cut : len(self.latest) - cut]
        return sum(kept) / len(kept)


@dataclass(frozen=True)
class Key:
    """What is counted together.

    Args:
        operation: name of the collective.
        nbytes: of the whole tensor that it is about, as in core's byte log.
        axis: over which ranks.
        site: where in the program, if that is told apart.
    """

    operation: str
    nbytes: int
    axis: str
    site: str = ""

    def __str__(self) -> str:
        return f"{self.operation} {self.nbytes} {self.axis} {self.site}".rstrip()


class LoggedCommunicator(CommunicatorWrapper):
    """Times every collective.

    Args:
        inner: the communicator to log.
        wait: waits for the device.
        kinds: operations that are logged; ``None`` for all.
        verbose: whether each gets a log line; may be changed.
        sites: whether places in the program are told apart; may be changed.
        synchronized: whether each is waited for at once. Messages between two ranks never are: the
            other rank may have to do something else first.
    """

    def __init__(
        self,
        inner: Communicator,
        wait: Callable[[], None],
        kinds: Collection[str] | None = None,
        *,
        verbose: bool = False,
        sites: bool = False,
        synchronized: bool = True,
    ) -> None:
        super().__init__(inner)
        self.records: dict[Key, Record] = {}
        self.verbose, self.sites = verbose, sites
        self._wait, self._kinds, self._synchronized = wait, kinds, synchronized

    def choose(self, kinds: Collection[str] | None) -> None:
        """Log these operations from here on; ``None`` for all."""
        self._kinds = kinds

    def run(self, collective: Collective) -> Handle:
        kind = collective.kind
        if self._kinds is not None and kind not in self._kinds:
            return self.inner.run(collective)
        at_once = self._synchronized and kind is not Kind.SEND_RECEIVE
        if at_once:
            self._wait()
        begun = time.perf_counter()
        handle = self.inner.run(collective)
        if not at_once and collective.asynchronous:
            return _Timed(handle, lambda: self._note(collective, begun))
        handle.wait()
        if at_once:
            self._wait()
        self._note(collective, begun)
        return DONE

    def _note(self, collective: Collective, begun: float) -> None:
        seconds = time.perf_counter() - begun
        site = str(collective.tag) if self.sites else ""
        axis = axis_name(collective.axis)
        key = Key(str(collective.kind), payload(collective), axis, site)
        record = self.records.get(key)
        if record is None:
            record = self.records[key] = Record(self.inner.size(collective.axis))
        record.add(seconds)
        if self.verbose:
            speed = rates(key, record.ranks, seconds)
            logger.info("%s: %.3f ms, %.2f Gbit/s, bus %.2f Gbit/s", key, seconds * 1e3, *speed)


class _Timed:
    """A handle that is noted when it is first waited for."""

    def __init__(self, handle: Handle, note: Callable[[], None]) -> None:
        self._handle = handle
        self._note: Callable[[], None] | None = note

    def wait(self) -> None:
        self._handle.wait()
        if self._note is not None:
            note, self._note = self._note, None
            note()


def payload(collective: Collective) -> int:
    """Bytes of the whole tensor that a collective is about; of messages, all that travel."""
    if not collective.tensors:
        return 0
    if collective.kind is Kind.SEND_RECEIVE:
        return sum(tensor.nbytes for tensor in collective.tensors)
    gathers = collective.kind is Kind.ALL_GATHER
    return int((collective.output if gathers else collective.input).nbytes)


def rates(key: Key, ranks: int, seconds: float) -> tuple[float, float]:
    """Gbit/s of the payload, and over the busiest link with a ring, as nccl-tests defines both."""
    speed = key.nbytes * 8 / seconds / 1e9 if seconds > 0 else 0.0
    turns = _WHOLE_TURNS.get(Kind(key.operation), 1)
    return speed, speed * turns * (ranks - 1) / ranks if turns else speed


# -- what scripts call -----------------------------------------------------------------------------


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Show what the job opened last has communicated; rank 0 writes it to standard output.

    Args:
        show_straggler: also how much longer each rank took than the fastest one, for what all
            ranks have logged equally often. Collective: all ranks must call it then.
        return_dict: return the numbers in place of writing them.

    Returns:
        With ``return_dict``: ``summary`` (operation -> key -> count, total_ms, mean_ms, algbw,
        busbw in Gbit/s), ``straggler_analysis`` (key -> milliseconds by rank) and ``metadata``.

    Raises:
        TrainingError: no open job has a log.
    """
    job, log = _current()
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for key, record in _ordered(log):
        mean = record.mean()
        speed, bus = rates(key, record.ranks, mean)
        summary.setdefault(key.operation, {})[str(key)] = {
            "count": record.count,
            "total_ms": 1e3 * record.total,
            "mean_ms": 1e3 * mean,
            "algbw": speed,
            "busbw": bus,
        }
    found: dict[str, Any] = {
        "summary": summary,
        "metadata": {
            "world_size": job.world_size,
            "rank": job.rank,
            "timestamp": time.time(),
        },
    }
    if show_straggler:
        found["straggler_analysis"] = _stragglers(job, log)
    if return_dict:
        return found
    if job.rank == 0:
        sys.stdout.write(_text(found))
        sys.stdout.flush()
    return None


def reset_log() -> None:
    """Forget what was logged.

    Raises:
        TrainingError: no open job has a log.
    """
    _current()[1].records.clear()


def has_comm_data() -> bool:
    """Whether anything was logged."""
    log = _log_of_last_job()
    return log is not None and bool(log[1].records)


def get_comm_operation_count(name: str | None = None) -> int:
    """How many collectives were logged, of one operation or of all."""
    log = _log_of_last_job()
    if log is None:
        return 0
    records = log[1].records.items()
    return sum(r.count for key, r in records if name in (None, key.operation))


def configure(
    deepspeed_config: object = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: list[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Change the log of the job opened last; what is ``None`` stays.

    Args:
        deepspeed_config: not looked at; the job has read its own.
        enabled: whether anything is logged.
        prof_all: whether all operations are.
        prof_ops: those that are, where not all are.
        verbose: whether each gets a log line.
        debug: whether places in the program are told apart.

    Raises:
        TrainingError: no open job has a log. It is put around the communicator when a job opens.
    """
    if enabled is False and _log_of_last_job() is None:
        return
    log = _current()[1]
    if enabled is False:
        log.choose(())
    elif prof_ops is not None and not prof_all:
        log.choose(prof_ops)
    elif prof_all or enabled:
        log.choose(None)
    log.verbose = log.verbose if verbose is None else verbose
    log.sites = log.sites if debug is None else debug


def _log_of_last_job() -> tuple[Job, LoggedCommunicator] | None:
    for job in reversed(open_jobs()):
        layer: Communicator | None = job.communicator
        while layer is not None:
            if isinstance(layer, LoggedCommunicator):
                return job, layer
            layer = getattr(layer, "inner", None)
    return None


def _current() -> tuple[Job, LoggedCommunicator]:
    found = _log_of_last_job()
    if found is None:
        raise TrainingError(
            'no open job logs its collectives: write "comms_logger": {} into its config'
        )
    return found


def _ordered(log: LoggedCommunicator) -> Iterator[tuple[Key, Record]]:
    yield from sorted(log.records.items(), key=lambda item: (item[0].operation, item[0].nbytes))


def _stragglers(job: Job, log: LoggedCommunicator) -> dict[str, list[float]]:
    """Milliseconds that each rank took beyond the fastest, by key. Collective over the world."""
    own = {str(key): (r.count, r.total) for key, r in log.records.items()}
    all_ranks = _gathered(job, log.inner, own)
    found = {}
    for name, (count, _) in own.items():
        entries = [ranks.get(name) for ranks in all_ranks]
        if any(entry is None or entry[0] != count for entry in entries):
            continue  # ranks of another stage, say, have other collectives
        totals = [1e3 * entry[1] for entry in entries if entry is not None]
        found[name] = [total - min(totals) for total in totals]
    return found


def _gathered(
    job: Job, communicator: Communicator, own: dict[str, tuple[int, float]]
) -> list[dict[str, tuple[int, float]]]:
    """What every rank has, on every rank."""
    text = json.dumps(own).encode()
    lengths = torch.zeros(job.world_size, dtype=torch.int64, device=job.device)
    mine = torch.tensor([len(text)], dtype=torch.int64, device=job.device)
    communicator.all_gather(lengths, mine, "world", _EXCHANGE)
    longest = int(lengths.max())
    padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device=job.device)
    texts = torch.zeros(job.world_size * longest, dtype=torch.uint8, device=job.device)
    communicator.all_gather(texts, padded, "world", _EXCHANGE)
    return [json.loads(bytes(row.tolist())) for row in texts.view(job.world_size, -1).cpu()]


def _text(found: dict[str, Any]) -> str:
    lines = [f"{'collective':44}{'count':>8}{'total ms':>12}{'mean ms':>10}{'Gbit/s':>9}{'bus':>9}"]
    for operations in found["summary"].values():
        for name, row in operations.items():
            lines.append(
                f"{name:44}{row['count']:>8}{row['total_ms']:>12.2f}{row['mean_ms']:>10.3f}"
                f"{row['algbw']:>9.2f}{row['busbw']:>9.2f}"
            )
    if "straggler_analysis" in found:
        lines += ["", "milliseconds beyond the fastest rank, by rank:"]
        for name, late in found["straggler_analysis"].items():
            lines.append(f"{name:44}" + "".join(f"{value:>10.2f}" for value in late))
    return "\n".join(lines) + "\n"
