"""Adds a run up: columns that make its wall time, goodput, and ranks that others wait for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from drivetrain_profiler.ledger.reading import Attempt, RankLedger, Step
from drivetrain_profiler.ledger.timeline import COMPUTE, PLAIN, START, is_exchange

RESTART, REDONE, WAITING = "restart", "done again", "waiting for other ranks"


@dataclass(frozen=True)
class Straggler:
    """A rank that others waited for.

    Args:
        rank: which.
        steps: in how many steps it was the one that was waited for longest.
        seconds: how long the others waited in these, the mean of all others.
        column: what took it longer than the others.
    """

    rank: int
    steps: int
    seconds: float
    column: str


@dataclass(frozen=True)
class Summary:
    """A run in numbers.

    Args:
        wall: seconds from the first process of the first attempt to the end of the last.
        columns: column -> seconds, the mean over ranks; they add up to ``wall``, but for what
            clocks of hosts and devices differ by.
        ranks: rank -> the same for one rank, over the attempts in which it took part.
        goodput: the part of ``wall`` in which steps that count computed, communicated, or waited
            for what was offloaded.
        attempts: how often the run was started.
        killed: how many attempts ended without having closed their job.
        steps: steps that count.
        redone: steps that a later attempt made again.
        samples: global samples of the steps that count.
        waiting: the part of communication in which a rank waited for others to be ready, by column.
        stragglers: whom it waited for, longest first.
        sent: axis and purpose -> bytes, the mean over ranks.
        host_bytes: the most that a process had.
        device_bytes: the most that tensors of one device took.
    """

    wall: float
    columns: Mapping[str, float]
    ranks: Mapping[int, Mapping[str, float]]
    goodput: float
    attempts: int
    killed: int
    steps: int
    redone: int
    samples: int
    waiting: Mapping[str, float]
    stragglers: Sequence[Straggler]
    sent: Mapping[str, float]
    host_bytes: int
    device_bytes: int


def in_order(columns: Iterable[str]) -> list[str]:
    """Columns as they are shown: computation, communication by axis and purpose, the rest."""
    own = [COMPUTE, "communication"]
    last = [*PLAIN[1:], RESTART, REDONE]
    found = set(columns)
    exchanges = sorted(column for column in found if is_exchange(column))
    return [c for c in own if c in found] + exchanges + [c for c in last if c in found]


def summary(attempts: Sequence[Attempt]) -> Summary:
    """Add up all attempts of a run, in order of time."""
    per_rank: dict[int, dict[str, float]] = {}
    totals: dict[str, float] = defaultdict(float)
    steps = redone = samples = 0
    for index, attempt in enumerate(attempts):
        following = [later.first_step for later in attempts[index + 1 :]]
        bound = min((number for number in following if number is not None), default=None)
        gap = max(0.0, attempt.started - attempts[index - 1].ended) if index else 0.0
        mine = [_columns(attempt, one, bound, gap, index > 0) for one in attempt.ranks.values()]
        for ledger, columns in zip(attempt.ranks.values(), mine, strict=True):
            kept = per_rank.setdefault(ledger.rank, defaultdict(float))
            for column, seconds in columns.items():
                kept[column] += seconds
                totals[column] += seconds / len(mine)
        first = attempt.ranks[min(attempt.ranks)]
        made = [s for s in first.steps if s.number is not None and s.engine == 0]
        counted = [s for s in made if not _again(s, bound)]
        steps, redone = steps + len(counted), redone + len(made) - len(counted)
        samples += sum(step.samples for step in counted)
    wall = attempts[-1].ended - attempts[0].started if attempts else 0.0
    good = sum(s for c, s in totals.items() if c in (COMPUTE, "offload") or is_exchange(c))
    waiting, stragglers = _stragglers(attempts)
    everyone = [ledger for attempt in attempts for ledger in attempt.ranks.values()]
    memory = [step.memory for ledger in everyone for step in ledger.steps]
    return Summary(
        wall=wall,
        columns={column: totals[column] for column in in_order(totals)},
        ranks={r: {c: of[c] for c in in_order(of)} for r, of in sorted(per_rank.items())},
        goodput=good / wall if wall else 0.0,
        attempts=len(attempts),
        killed=sum(not all(one.closed for one in a.ranks.values()) for a in attempts),
        steps=steps,
        redone=redone,
        samples=samples,
        waiting={column: waiting[column] for column in in_order(waiting)},
        stragglers=stragglers,
        sent=_sent(attempts),
        host_bytes=max((host for host, _, _ in memory), default=0),
        device_bytes=max((peak for _, _, peak in memory), default=0),
    )


def _again(step: Step, bound: int | None) -> bool:
    """Whether a later attempt made a step again; it began with number ``bound``."""
    return bound is not None and step.number is not None and step.number >= bound


def _columns(
    attempt: Attempt, ledger: RankLedger, bound: int | None, gap: float, restarted: bool
) -> dict[str, float]:
    """The time of one rank in one attempt and the gap before it."""
    found: dict[str, float] = defaultdict(float, attempt.around(ledger))
    for step in ledger.steps:
        for column, seconds in step.seconds.items():
            found[REDONE if _again(step, bound) else column] += seconds
    if restarted:
        found[RESTART] += gap + found.pop(START, 0.0)
    return {column: seconds for column, seconds in found.items() if seconds > 0}


def _stragglers(attempts: Sequence[Attempt]) -> tuple[dict[str, float], list[Straggler]]:
    """Tell waiting from moving data: in one step, what the fastest rank needed is the moving.

    The rank that waits least in a step is the one that others wait for.
    """
    waiting: dict[str, float] = defaultdict(float)
    late: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for attempt in attempts:
        by_step: dict[tuple[int, int], dict[int, Step]] = defaultdict(dict)
        for ledger in attempt.ranks.values():
            for step in ledger.steps:
                if step.number is not None:
                    by_step[step.engine, step.number][ledger.rank] = step
        for ranks in by_step.values():
            if len(ranks) < 2:
                continue
            excess = _excess(ranks)
            for column, seconds in excess.items():
                waiting[column] += fmean(seconds.values())
            totals = {rank: sum(of[rank] for of in excess.values()) for rank in ranks}
            slowest = min(ranks, key=lambda rank: totals[rank])
            others = [seconds for rank, seconds in totals.items() if rank != slowest]
            late[slowest].append((fmean(others) - totals[slowest], _reason(ranks, slowest)))
    found = [_straggler(rank, of) for rank, of in late.items()]
    return dict(waiting), sorted(found, key=lambda one: -one.seconds)


def _excess(ranks: Mapping[int, Step]) -> dict[str, dict[int, float]]:
    """Column of communication -> rank -> seconds beyond the rank that needed least."""
    columns = {c for step in ranks.values() for c in step.seconds if is_exchange(c)}
    found = {}
    for column in columns:
        # Ranks that do not communicate along an axis at all are no measure for those that do.
        own = {rank: step.seconds.get(column, 0.0) for rank, step in ranks.items()}
        least = min((seconds for seconds in own.values() if seconds), default=0.0)
        found[column] = {rank: max(0.0, seconds - least) for rank, seconds in own.items()}
    return found


def _reason(ranks: Mapping[int, Step], slowest: int) -> str:
    """The column in which a rank differs most from what is usual in its step."""
    columns = [c for c in PLAIN if any(c in step.seconds for step in ranks.values())]

    def more(column: str) -> float:
        usual = median(s.seconds.get(column, 0.0) for r, s in ranks.items() if r != slowest)
        return ranks[slowest].seconds.get(column, 0.0) - usual

    return max(columns, key=more) if columns else COMPUTE


def _straggler(rank: int, late: Sequence[tuple[float, str]]) -> Straggler:
    by_column: dict[str, float] = defaultdict(float)
    for seconds, column in late:
        by_column[column] += seconds
    column = max(by_column, key=lambda name: by_column[name])
    return Straggler(rank, len(late), sum(seconds for seconds, _ in late), column)


def _sent(attempts: Sequence[Attempt]) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for attempt in attempts:
        for ledger in attempt.ranks.values():
            for step in ledger.steps:
                for name, nbytes in step.sent.items():
                    totals[name] += nbytes / len(attempt.ranks)
    return dict(sorted(totals.items()))
