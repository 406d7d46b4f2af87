"""Who is missing: what follows from what the ranks have written, and what does not.

A rank that waits, and one that it waits for, are two facts with different times. What is concluded
holds whenever the records were written:

- A rank that has closed its job without issuing what another waits for will never issue it.
- Ranks that wait for each other in a circle wait for ever, since a rank that waits issues nothing:
  the first to leave the circle would have to have been given what the next one issued later.
- A stopped process does not come by itself.

A living rank that does something else may be slow: a compiler, a checkpoint on a slow disk, data.
That is no error, however long it takes. It is one only if the rank stands still for longer than the
config's patience.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drivetrain_watchdog.history import members

_MOST = 64
"""Ranks that one look follows, so that a large job does not flood its store."""

Order = Callable[[int, Sequence[int]], Iterable[int]]
"""In which order the ranks that one rank waits for are looked at."""

Record = Mapping[str, Any]
"""What a rank writes of itself; see ``Watch.record``."""


@dataclass(frozen=True)
class Cause:
    """Why a rank waits.

    Args:
        rank: whom it waits for in the end.
        text: all of it in words.
        is_certain: whether that rank will not come; else it may be slow.
    """

    rank: int
    text: str
    is_certain: bool


def find_cause(
    rank: int,
    own: Record,
    record_of: Callable[[int], Record | None],
    patience: float,
    order: Order = lambda _rank, peers: peers,
) -> Cause | None:
    """Follow those that are waited for until one is found that does not wait.

    Args:
        rank: a rank that waits.
        own: its record.
        record_of: answers the records of others; ``None`` where there is none yet.
        patience: seconds for which a rank may stand still; 0 for ever.
        order: of those that a rank waits for, where not all can be looked at.

    Returns:
        A certain cause if there is one, else a rank that may be slow; ``None`` if nothing is known.
    """
    slow: Cause | None = None
    known: dict[int, Record] = {rank: own}
    ways: deque[tuple[int, tuple[str, ...], bool]] = deque([(rank, (), True)])
    while ways:
        at, way, exact = ways.popleft()
        wait = known[at]["wait"]
        for peer, name, count in _missing(at, wait["needs"], known, record_of, order):
            step = f"rank {at} {said(wait)}"
            through = exact and wait["exact"]
            if peer == rank and through:
                text = f"ranks wait for each other: {'; '.join([*way, step])}, for rank {rank}"
                return Cause(peer, text, is_certain=True)
            record = known[peer]
            found = _verdict(peer, record, name, count, patience)
            if found is not None:
                text = "; ".join([*way, f"{step}, for rank {peer}, which {found[0]}"])
                if found[1]:
                    return Cause(peer, text, is_certain=True)
                slow = slow or Cause(peer, text, is_certain=False)
            elif peer != rank and len(known) <= _MOST:
                ways.append((peer, (*way, step), through))
    return slow or _silent(rank, own, record_of, patience, order)


def _silent(
    rank: int,
    own: Record,
    record_of: Callable[[int], Record | None],
    patience: float,
    order: Order,
) -> Cause | None:
    """One who has come to what ``rank`` waits in, and is not heard of since: its host is cut off.

    Then what has been sent does not arrive, though nobody is missing.
    """
    for name in own["wait"]["needs"]:
        for peer in order(rank, members(name)):
            record = record_of(peer) if peer != rank else None
            if record is not None and 0 < patience <= record["silent"] and not record["left"]:
                text = f"rank {rank} {said(own['wait'])}, to which rank {peer} has come, but that "
                return Cause(peer, text + _without_life(record), is_certain=True)
    return None


def _without_life(record: Record) -> str:
    return (
        f"gives no sign of life for {record['silent']:.0f} s, last seen "
        f"{place(record)}{caught(record)}"
    )


def _missing(
    at: int,
    needs: Mapping[str, int],
    known: dict[int, Record],
    record_of: Callable[[int], Record | None],
    order: Order,
) -> Iterator[tuple[int, str, int]]:
    """Ranks that have not issued what ``at`` needs; of those that are new, their records."""
    for name, count in needs.items():
        for peer in order(at, members(name)):
            if peer == at:
                continue
            is_new = peer not in known
            record = record_of(peer) if is_new else known[peer]
            if record is None:
                continue
            known[peer] = record
            first = next(iter(known))
            if _count(record, name) < count and (is_new or peer == first):
                yield peer, name, count


def _verdict(
    rank: int, record: Record, name: str, count: int, patience: float
) -> tuple[str, bool] | None:
    """What keeps a rank, and whether for ever; ``None`` if it waits for others itself."""
    if record["left"]:
        last = f" after {record['last'][name]}" if record["last"].get(name) else ""
        return f"has closed its job{last}{caught(record)}", True
    if record["stopped"]:
        return f"is stopped (SIGSTOP, or a debugger), last seen {place(record)}", True
    if 0 < patience <= record["silent"]:  # whatever it waited in then
        return _without_life(record), True
    if record["wait"] is not None:
        return None
    if 0 < patience <= record["still"]:
        return f"stands still for {record['still']:.0f} s {place(record)}{caught(record)}", True
    return f"is {place(record)}{caught(record)}", False


def said(wait: Mapping[str, Any]) -> str:
    """What a rank waits in."""
    where = f" ({wait['where']})" if wait["where"] else ""
    return f"waits in {wait['what']}{where}"


def place(record: Record) -> str:
    """Where a rank is."""
    where = f" ({record['where']})" if record["where"] else ""
    return f"at {record['at']}{where}, in step {record['step'] + 1}"


def caught(record: Record) -> str:
    """An exception that a rank's script has caught."""
    return f"; its script has caught {record['caught']}" if record["caught"] else ""


def _count(record: Record, name: str) -> int:
    found = record["lines"].get(name)
    return int(found[0]) if found else 0
