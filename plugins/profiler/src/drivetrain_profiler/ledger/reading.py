"""Reads the ledgers that the ranks of a run have written, of all its attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivetrain.errors import DrivetrainError
from drivetrain_profiler.ledger.recorder import FORMAT
from drivetrain_profiler.ledger.section import PATH
from drivetrain_profiler.ledger.timeline import IDLE, START, Interval

_SAME_CLOCK = 0.05
"""Seconds by which ranks of one host may seem to differ, since they were not woken at once."""


@dataclass(frozen=True)
class Step:
    """What one rank did from the end of one step to the end of the next.

    Args:
        number: of the step that ends it, from 1; ``None`` for what came after the last one.
        engine: which one of the job, from 0.
        begin: seconds after the job was opened.
        wall: seconds by the clock of the device.
        host: the same by the clock of the host.
        seconds: column -> seconds, which add up to ``wall``.
        samples: global samples of the step.
        memory: bytes of the process, of tensors on the device, and the most of these so far.
        sent: axis and purpose -> bytes that this rank has sent.
        spans: its intervals, where they were kept.
    """

    number: int | None
    engine: int
    begin: float
    wall: float
    host: float
    seconds: Mapping[str, float]
    samples: int
    memory: tuple[int, int, int]
    sent: Mapping[str, int]
    spans: tuple[Interval, ...] | None


@dataclass
class RankLedger:
    """One rank in one attempt.

    Args:
        rank: which.
        world: number of ranks.
        axes: axis -> number of ranks along it.
        started: when the process began, seconds since the epoch by the clock of rank 0.
        opened: when its job did.
        steps: in order; the last one may be the rest after the last step.
        closed: whether the job was closed; else it was killed.
    """

    rank: int
    world: int
    axes: Mapping[str, int]
    started: float
    opened: float
    steps: list[Step] = field(default_factory=list)
    closed: bool = False

    @property
    def ended(self) -> float:
        """When its last line was written."""
        return self.opened + sum(step.host for step in self.steps)


@dataclass
class Attempt:
    """All ranks from one start to its end.

    Args:
        ranks: rank -> its ledger.
    """

    ranks: dict[int, RankLedger]

    @property
    def started(self) -> float:
        """When its first process began."""
        return min(ledger.started for ledger in self.ranks.values())

    @property
    def ended(self) -> float:
        """When its last rank wrote for the last time."""
        return max(ledger.ended for ledger in self.ranks.values())

    @property
    def first_step(self) -> int | None:
        """Number of the first step of the first engine; ``None`` if it made none."""
        numbers = [
            step.number
            for ledger in self.ranks.values()
            for step in ledger.steps
            if step.number is not None and step.engine == 0
        ]
        return min(numbers, default=None)

    def around(self, ledger: RankLedger) -> dict[str, float]:
        """What one rank waited before its job was opened, and after its last line."""
        return {START: ledger.opened - self.started, IDLE: self.ended - ledger.ended}


def read_run(folder: Path) -> list[Attempt]:
    """The attempts of a run in order of time.

    Args:
        folder: with the files of all ranks; or one that has it under its usual name.

    Raises:
        DrivetrainError: it has no ledger, or a file is none.
    """
    files = sorted(folder.glob("*-rank*.jsonl"))
    if not files and (folder / PATH).is_dir():
        files = sorted((folder / PATH).glob("*-rank*.jsonl"))
    if not files:
        raise DrivetrainError(
            f'{folder} has no ledger of a run: write "{PATH}": {{}} into the config of the next one'
        )
    by_name: dict[str, dict[int, tuple[RankLedger, float | None]]] = {}
    for file in files:
        name, ledger, met = _read(file)
        by_name.setdefault(name, {})[ledger.rank] = ledger, met
    attempts = [Attempt(_of_one_clock(ranks)) for ranks in by_name.values()]
    return sorted(attempts, key=lambda attempt: attempt.started)


def _of_one_clock(
    ranks: Mapping[int, tuple[RankLedger, float | None]],
) -> dict[int, RankLedger]:
    """Move ranks of other hosts to the clock of the first; all have met at one moment."""
    first = ranks[min(ranks)][1]
    for ledger, met in ranks.values():
        shift = 0.0 if met is None or first is None else first - met
        if abs(shift) > _SAME_CLOCK:
            ledger.started += shift
            ledger.opened += shift
    return {rank: ledger for rank, (ledger, _) in sorted(ranks.items())}


def _read(file: Path) -> tuple[str, RankLedger, float | None]:
    """A name that the ranks of an attempt share, one rank's ledger, and when it met the others."""
    lines = _lines(file)
    head = next(lines, {})
    if head.get("format") != FORMAT:
        raise DrivetrainError(f"{file} is no ledger of this version (format {FORMAT})")
    own = ("rank", "world", "axes", "started", "opened")
    ledger = RankLedger(**{name: head[name] for name in own})
    name, met = file.name, None
    for line in lines:
        if "met" in line:
            name, met = str(line["attempt"]), float(line["met"])
            continue
        ledger.steps.append(_step(line))
        ledger.closed = ledger.closed or "end" in line
    return name, ledger, met


def _step(line: Mapping[str, Any]) -> Step:
    spans = [Interval(*span) for span in line["spans"]] if "spans" in line else None
    return Step(
        number=line.get("step"),
        engine=line.get("engine", 0),
        begin=line["begin"],
        wall=line["wall"],
        host=line["host"],
        seconds=line["seconds"],
        samples=line.get("samples", 0),
        memory=tuple(line["memory"]),
        sent=line["sent"],
        spans=None if spans is None else tuple(spans),
    )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """What a file says; a last line that was cut off by a crash says nothing."""
    try:
        texts = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DrivetrainError(f"{file} cannot be read: {error.strerror}") from error
    for number, text in enumerate(texts[:-1], 1):
        try:
            yield json.loads(text)
        except ValueError:
            raise DrivetrainError(f"{file}:{number} is damaged") from None
