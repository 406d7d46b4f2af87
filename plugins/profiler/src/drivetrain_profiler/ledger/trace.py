"""A run's ledger in the format that chrome://tracing and Perfetto show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from drivetrain_profiler.ledger.reading import Attempt, RankLedger


def chrome_trace(attempts: Sequence[Attempt]) -> str:
    """One process per rank: its steps, and below them the spans of those that were kept whole."""
    origin = attempts[0].started if attempts else 0.0
    events: list[dict[str, Any]] = []
    for number, attempt in enumerate(attempts, 1):
        for ledger in attempt.ranks.values():
            events += _of_rank(ledger, number, origin)
    ranks = sorted({event["pid"] for event in events})
    names = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in ranks
    ]
    return json.dumps({"traceEvents": [*names, *events], "displayTimeUnit": "ms"})


def _of_rank(ledger: RankLedger, attempt: int, origin: float) -> Iterator[dict[str, Any]]:
    start = ledger.opened - origin
    yield _event("start of the process", "start", ledger.rank, 0, ledger.started - origin, -1.0) | {
        "dur": 1e6 * (ledger.opened - ledger.started)
    }
    for step in ledger.steps:
        name = "after the last step" if step.number is None else f"step {step.number}"
        whole = _event(name, "step", ledger.rank, 0, start + step.begin, step.wall)
        yield whole | {"args": {"attempt": attempt, "seconds": dict(step.seconds)}}
        for span in step.spans or ():
            begin = start + span.begin
            yield _event(span.name, span.column, ledger.rank, 1, begin, span.seconds)


def _event(
    name: str, column: str, rank: int, row: int, begin: float, seconds: float
) -> dict[str, Any]:
    times = {"ts": 1e6 * begin, "dur": 1e6 * seconds}
    return {"name": name, "cat": column, "ph": "X", "pid": rank, "tid": row, **times}
